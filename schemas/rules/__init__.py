"""Rules: a rule binds a hook, a topic filter and an action to a Redis pool.

The way of the rules:

1. A user writes them in a `millpond.toml` (`toml.py`) or an `emqx_backend_redis.conf` (`conf.py`).
2. Both formats become drafts. `build.py` checks each draft, and `check.py` checks all rules together.
3. A worker writes its rules into the log, in canonical form (`Rules.canonical`). From that record on they are in force.

A rule from the log must pass `rule_error`, as every rule from a file. The checks of `build.py` and `check.py` are for
files alone: rules in the log have passed them once.
"""

from __future__ import annotations

from millpond.schemas.rules.conf import parse_conf
from millpond.schemas.rules.pool import Pool
from millpond.schemas.rules.rule import Action, Hook, Rule
from millpond.schemas.rules.ruleset import Rules, default_rules
from millpond.schemas.rules.toml import parse_toml

__all__ = ["Action", "Hook", "Pool", "Rule", "Rules", "default_rules", "parse_conf", "parse_toml"]
