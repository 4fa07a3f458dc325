"""KubeSpawner's `profile_list`, for every spawner: pure functions on its plain dicts.

A profile may carry ``"gpu_custom": True``: its user gives the fields of `options.FIELDS` directly; and ``"allowed_groups": ["staff"]``:
it is there for the members of these JupyterHub groups alone.

Where any profile says how much GPU (`AMOUNTS`), each says all of it: one that says nothing is without a GPU, whatever the spawner's own
traits say. Where none does, those traits count for all.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from nbgpu.errors import InvalidValue, NbgpuError, Refused

from .options import FIELDS, LABELS, SETTINGS, Wish, wish_from, wrong

Profile = dict[str, Any]
OVERRIDE = "kubespawner_override"
AMOUNTS = ("gpu_fraction", "gpu_memory", "gpu_compute")
UNLISTED = "--unlisted-choice"


def default_profiles(configured: Mapping[str, Any] | None = None) -> list[Profile]:
    """Return the profiles of an installation whose admin set none.

    Parameters
    ----------
    configured : mapping, optional
        The spawner's own `options.FIELDS`. The amount that they name is chosen at a user's first visit; without one it is CPU only.
    """
    usual = {name: value for name in AMOUNTS if (value := (configured or {}).get(name)) is not None}
    shares = [("eighth", "One eighth of a GPU", "1/8"), ("quarter", "A quarter of a GPU", "1/4"), ("half", "Half a GPU", "1/2")]
    found: list[Profile] = [
        {"slug": "cpu", "display_name": "CPU only", "description": "No GPU."},
        *({"slug": slug, "display_name": name, OVERRIDE: {"gpu_fraction": share}} for slug, name, share in shares),
        {"slug": "whole", "display_name": "A whole GPU", OVERRIDE: {"gpu_fraction": 1}},
        {"slug": "custom", "display_name": "Custom", "description": "Say how much you need.", "gpu_custom": True},
    ]
    first = next((profile for profile in found if not profile.get("gpu_custom") and _same_amount(profile.get(OVERRIDE, {}), usual)), None)
    if first is None:
        first = {"slug": "usual", "display_name": "The usual share", OVERRIDE: usual}
        found.insert(1, first)
    first["default"] = True
    return found


def _same_amount(override: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Return whether a profile stands for what is configured; what is configured wrongly is like no other."""
    try:
        return wish_from(override) == wish_from(usual)
    except InvalidValue:
        return False


def for_groups(profile_list: Any, groups: Iterable[str]) -> list[Profile]:
    """Return the profiles of `profile_list` (list, or dict sorted by key) that members of `groups` may use.

    Raises
    ------
    Refused
        There are profiles, but none for them.
    """
    if isinstance(profile_list, Mapping):
        profile_list = [profile_list[key] for key in sorted(profile_list)]
    profiles = _say_all(list(profile_list or []))
    mine = set(groups)
    found = [one for one in profiles if one.get("allowed_groups") is None or mine.intersection(_names(one["allowed_groups"]))]
    if profiles and not found:
        raise Refused("Each profile here is for a group that you are not in. Ask the admin.", code="no-profile")
    return found


def _say_all(profiles: list[Profile]) -> list[Profile]:
    """Return `profiles`, where any of them says an amount with each saying all of it: of what is configured nothing is mixed in."""
    if not any(_says_amount(profile) for profile in profiles):
        return profiles
    return [{**profile, OVERRIDE: {**dict.fromkeys(AMOUNTS), **(profile.get(OVERRIDE) or {})}} for profile in profiles]


def _says_amount(profile: Profile) -> bool:
    options = (profile.get("profile_options") or {}).values()
    choices = [choice for option in options for choice in [*(option.get("choices") or {}).values(), option.get("unlisted_choice") or {}]]
    return bool(profile.get("gpu_custom")) or any(name in (one.get(OVERRIDE) or {}) for one in [profile, *choices] for name in AMOUNTS)


def _names(groups: Any) -> list[str]:
    return [groups] if isinstance(groups, str) else list(groups)


def initialise(profile_list: Any) -> list[Profile]:
    """Return a copy of `profile_list` (list, or dict sorted by key) with a slug each, exactly one default, default choices set."""
    if isinstance(profile_list, Mapping):
        profile_list = [profile_list[key] for key in sorted(profile_list)]
    profiles: list[Profile] = copy.deepcopy(list(profile_list or []))
    for profile in profiles:
        profile.setdefault("slug", _slug(profile["display_name"]))
        for option in profile.get("profile_options", {}).values():
            choices = option.get("choices") or {}
            if choices and not any(choice.get("default") for choice in choices.values()):
                next(iter(choices.values()))["default"] = True
    defaults = [profile for profile in profiles if profile.get("default")] or profiles[:1]
    for profile in profiles:
        profile["default"] = bool(defaults) and profile is defaults[0]
    return profiles


def selected(profiles: list[Profile], options: Mapping[str, Any]) -> Profile | None:
    """Return the profile that `options` name: the custom one when only its fields are given, else the default; None when there are none.

    Raises
    ------
    InvalidValue
        No such profile.
    """
    slug = options.get("profile")
    if slug in (None, ""):
        if any(name in options for name in FIELDS):
            custom = next((profile for profile in profiles if profile.get("gpu_custom")), None)
            if custom is not None:
                return custom
        return next((profile for profile in profiles if profile["default"]), None)
    for profile in profiles:
        if profile["slug"] == slug:
            return profile
    slugs = ", ".join(profile["slug"] for profile in profiles)
    raise wrong("profile", slug, f"one of {slugs}" if slugs else "left out: there are no profiles here")


def check_keys(profile: Profile | None, options: Mapping[str, Any], others_allowed: bool) -> None:
    """Refuse keys that nobody reads.

    Parameters
    ----------
    profile : Profile, optional
        The selected one.
    options : mapping
        ``user_options`` as they came.
    others_allowed : bool
        The admin has code of their own that reads other keys; those that begin with ``gpu_`` are ours even so.

    Raises
    ------
    NbgpuError
        Names the first such key and those allowed.
    """
    allowed = ["profile"]
    for name in (profile or {}).get("profile_options", {}):
        allowed += [name, name + UNLISTED]
    if profile is None or profile.get("gpu_custom"):
        allowed += FIELDS
    for key in options:
        if key not in allowed and (not others_allowed or str(key).startswith("gpu_")):
            message = f"user_options has {str(key)[:60]!r}, which nothing reads here; it may have {', '.join(allowed)}."
            raise NbgpuError(message, code="invalid", status=400, field="user_options")


def overrides(profile: Profile | None, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the overrides of `profile` and of the choices in `options`, in the order in which they apply.

    Raises
    ------
    InvalidValue
        A choice that the profile does not have.
    """
    if profile is None:
        return []
    found = [dict(profile.get(OVERRIDE) or {})]
    for name, option in profile.get("profile_options", {}).items():
        found.append(_option_overrides(name, option, options))
    return found


def wish_of(profile: Profile | None, options: Mapping[str, Any], configured: Mapping[str, Any]) -> Wish | None:
    """Return how much GPU `profile` with `options` stands for, over what is `configured` for everyone.

    Overrides that are callables are left out: they need a spawner.
    """
    values = dict(configured)
    for override in overrides(profile, options):
        values.update({name: value for name, value in override.items() if name in SETTINGS and not callable(value)})
    values.update(custom_fields(profile, options))
    return wish_from(values)


def custom_fields(profile: Profile | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the user of a custom choice gave; empty text is no value.

    Where there are no profiles, an amount that they gave stands in place of all that is configured of it.

    Raises
    ------
    InvalidValue
        A custom choice that names no amount.
    """
    if profile is not None and not profile.get("gpu_custom"):
        return {}
    given = {name: options[name] for name in FIELDS if options.get(name) not in (None, "")}
    if profile is not None and not any(name in given for name in AMOUNTS):
        allowed = f"a fraction of one GPU such as 0.25, 1/4 or 25%, unless {LABELS['gpu_memory']} says an amount such as 20 GiB"
        raise wrong("gpu_fraction", "", allowed)
    if profile is None and ("gpu_fraction" in given or "gpu_memory" in given):
        return {**dict.fromkeys(AMOUNTS), **given}
    return given


def options_from_form(form: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return ``user_options`` from the start page's fields, named as in KubeSpawner's form. Empty text is left out."""
    slug = next(iter(form.get("profile") or []), None)
    if not slug:
        # a link such as /hub/spawn?gpu_fraction=1/4
        return {name: form[name][0] for name in FIELDS if form.get(name) and form[name][0] != ""}
    offered = options_of(slug) if isinstance(slug, str) else None
    if offered is not None:
        return offered
    options: dict[str, Any] = {"profile": slug}
    prefix = f"profile-option-{slug}--"
    for key, values in form.items():
        if key.startswith(prefix) and values and values[0] != "":
            options[key[len(prefix) :]] = values[0]
        elif key in FIELDS and values and values[0] != "":
            options[key] = values[0]
    return options


def options_of(value: str) -> dict[str, Any] | None:
    """Return the options that a field of one value stands for; None of what is none. A user's words: to be checked as any others."""
    if not value.startswith("{"):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _option_overrides(name: str, option: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    choices: Mapping[str, Any] = option.get("choices") or {}
    unlisted = option.get("unlisted_choice") or {}
    free_text, choice = options.get(name + UNLISTED), options.get(name)
    label: str | None = option.get("display_name")
    if free_text not in (None, ""):
        pattern = unlisted.get("validation_regex")
        if not unlisted.get("enabled") or not isinstance(free_text, str):
            raise InvalidValue(name, free_text, _one_of(choices), label)
        if pattern and not re.match(pattern, free_text):
            raise InvalidValue(name, free_text, unlisted.get("validation_message") or f"text that matches {pattern}", label)
        return {key: _filled(value, free_text) for key, value in (unlisted.get(OVERRIDE) or {}).items()}
    if choice not in (None, ""):
        if not isinstance(choice, str) or choice not in choices:
            raise InvalidValue(name, choice, _one_of(choices), label)
        return dict(choices[choice].get(OVERRIDE) or {})
    default = next((choice for choice in choices.values() if choice.get("default")), None)
    if default is None:
        raise InvalidValue(name, "", "given: this profile has no default for it", label)
    return dict(default.get(OVERRIDE) or {})


def _one_of(choices: Iterable[str]) -> str:
    return "one of " + ", ".join(choices)


def _filled(value: Any, text: str) -> Any:
    """Replace ``{value}`` only: a template is the admin's, but `text` is the user's and must not be read as one."""
    if isinstance(value, str):
        return value.replace("{value}", text)
    if isinstance(value, list):
        return [_filled(item, text) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, text) for key, item in value.items()}
    return value


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "profile"
