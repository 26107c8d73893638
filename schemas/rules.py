"""Rules: which hook, for which topics, does what, in which Redis. All that others need of them.

They are read from the user's file; the ones in force travel through the log in canonical form.
"""

from __future__ import annotations

from schemas.pool import Pool
from schemas.rule import Action, Hook, Rule
from schemas.rules_conf import parse_conf
from schemas.rules_toml import parse_toml
from schemas.ruleset import Rules, default_rules

__all__ = ["Action", "Hook", "Pool", "Rule", "Rules", "default_rules", "parse_conf", "parse_toml"]
