"""Rules: which hook, for which topics, does what, in which Redis. All that others need of them.

They are read from the user's file; the ones in force travel through the log in canonical form.
"""

from __future__ import annotations

from millpond.schemas.rules.conf import parse_conf
from millpond.schemas.rules.pool import Pool
from millpond.schemas.rules.rule import Action, Hook, Rule
from millpond.schemas.rules.ruleset import Rules, default_rules
from millpond.schemas.rules.toml import parse_toml

__all__ = ["Action", "Hook", "Pool", "Rule", "Rules", "default_rules", "parse_conf", "parse_toml"]
