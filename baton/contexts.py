"""Contexts: which federation a command speaks to, so that a second terminal needs no flags.

Theory: like kubectl's, but one small TOML file of ours: named sets of endpoints with a namespace and certificates, and one
that is current. What is nearer wins: a flag, then the environment, then the file. `baton local up` writes its context
here through `write_context`; a person may edit the file. It is replaced atomically, so a reader never sees half of it.
"""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton import names
from baton.errors import FieldViolation, InvalidField

CONFIG_VARIABLE = "BATON_CONFIG"
ENDPOINT_VARIABLE = "BATON_ENDPOINT"
CONTEXT_VARIABLE = "BATON_CONTEXT"
NAMESPACE_VARIABLE = "BATON_NAMESPACE"

_KEYS = ("endpoints", "namespace", "ca", "certificate", "key")


@dataclass(frozen=True, slots=True)
class Context:
    """One federation as its user reaches it. `ca`, `certificate` and `key` are paths of PEM files, or all empty."""

    endpoints: tuple[str, ...]
    namespace: str = names.DEFAULT_NAMESPACE
    ca: str = ""
    certificate: str = ""
    key: str = ""


def config_path(env: Mapping[str, str]) -> Path:
    """The file of contexts: $BATON_CONFIG, or baton/contexts.toml in $XDG_CONFIG_HOME, by default .config in the home folder."""
    given = env.get(CONFIG_VARIABLE)
    if given:
        return Path(given)
    base = env.get("XDG_CONFIG_HOME") or Path(env.get("HOME") or Path.home()) / ".config"
    return Path(base) / "baton" / "contexts.toml"


def read_contexts(env: Mapping[str, str]) -> tuple[str, dict[str, Context]]:
    """The name of the current context ("" if none) and all contexts. Raises InvalidField naming file and key."""
    path = config_path(env)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "", {}
    except OSError as error:
        raise InvalidField(
            f"{path}: cannot be read: {error.strerror}; name another file with {CONFIG_VARIABLE}"
        ) from None
    except UnicodeDecodeError:
        raise InvalidField(f"{path}: is not UTF-8 text; mend or delete it") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidField(f"{path}: is not TOML: {error}; mend or delete it") from None
    found = {}
    for name, entry in _table(path, data, "contexts").items():
        found[name] = _context(path, f"contexts.{name}", entry)
    current = data.get("current", "")
    if not isinstance(current, str):
        raise InvalidField(f'{path}: current: write the name of a context in quotes, or ""')
    return current, found


def write_context(
    name: str,
    endpoints: Sequence[str],
    *,
    env: Mapping[str, str],
    namespace: str = names.DEFAULT_NAMESPACE,
    ca: str = "",
    certificate: str = "",
    key: str = "",
) -> Path:
    """Adds or replaces a context and makes it the current one; the file's path. Raises InvalidField naming the file."""
    if problem := names.id_problem(name):
        raise InvalidField(f"context name {problem}")
    _, contexts = read_contexts(env)
    contexts[name] = Context(tuple(endpoints), namespace, ca, certificate, key)
    return _write(env, name, contexts)


def remove_context(name: str, *, env: Mapping[str, str]) -> None:
    """Removes a context; nothing happens if there is none. Raises InvalidField naming the file."""
    current, contexts = read_contexts(env)
    if contexts.pop(name, None) is not None:
        _write(env, "" if current == name else current, contexts)


def check_writable(env: Mapping[str, str]) -> None:
    """Raises InvalidField, naming the file and what to do, if `write_context` could not write."""
    read_contexts(env)
    path = config_path(env)
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def resolve(
    *, endpoints: Sequence[str] = (), context: str = "", namespace: str = "", env: Mapping[str, str]
) -> Context:
    """The federation meant by flags and environment. Raises InvalidField if none is."""
    current, contexts = read_contexts(env)
    wanted = context or env.get(CONTEXT_VARIABLE, "") or current
    given = tuple(endpoints) or tuple(
        part.strip() for part in env.get(ENDPOINT_VARIABLE, "").split(",") if part.strip()
    )
    if wanted and wanted not in contexts and (context or not given):
        known = ", ".join(sorted(contexts)) or "none"
        fix = "choose a known one with --context NAME, or give --endpoint HOST:PORT"
        raise InvalidField(
            f"there is no context {names.quote(wanted)} in {config_path(env)} (known: {known}): {fix}",
            field_violations=[FieldViolation("context", fix)],
        )
    base = contexts.get(wanted)
    if base is None and not given:
        fix = f"give --endpoint HOST:PORT or {ENDPOINT_VARIABLE}"
        message = f"no federation is named: run `baton local up`, or {fix}"
        if contexts:
            fix = f"choose one with --context NAME or {CONTEXT_VARIABLE}"
            message = (
                f"no context of {config_path(env)} is the current one (known: {', '.join(sorted(contexts))}): {fix}"
            )
        raise InvalidField(message, field_violations=[FieldViolation("context" if contexts else "endpoint", fix)])
    space = namespace or env.get(NAMESPACE_VARIABLE, "") or (base.namespace if base else names.DEFAULT_NAMESPACE)
    if problem := names.id_problem(space):
        raise InvalidField(f"namespace {problem}", field_violations=[FieldViolation("namespace", problem)])
    if base is None:
        return Context(given, space)
    return Context(given or base.endpoints, space, base.ca, base.certificate, base.key)


def _context(path: Path, at: str, entry: Any) -> Context:
    if not isinstance(entry, dict):
        raise InvalidField(f"{path}: {at}: is no table; write [{at}]")
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise InvalidField(f"{path}: {at}.{unknown[0]}: is not a known key; use {', '.join(_KEYS)}")
    endpoints = entry.get("endpoints", [])
    if not isinstance(endpoints, list) or not endpoints or not all(isinstance(each, str) for each in endpoints):
        raise InvalidField(f'{path}: {at}.endpoints: write a list such as ["127.0.0.1:7400"]')
    texts = {}
    for key in _KEYS[1:]:
        value = entry.get(key, "")
        if not isinstance(value, str):
            raise InvalidField(f"{path}: {at}.{key}: write text in quotes")
        texts[key] = value
    space = texts.pop("namespace") or names.DEFAULT_NAMESPACE
    return Context(tuple(endpoints), space, **texts)


def _table(path: Path, data: dict[str, Any], key: str) -> dict[str, Any]:
    table = data.get(key, {})
    if not isinstance(table, dict):
        raise InvalidField(f"{path}: {key}: is no table; write [{key}.NAME]")
    return table


def _write(env: Mapping[str, str], current: str, contexts: Mapping[str, Context]) -> Path:
    path = config_path(env)
    lines = ["# Which federation `baton` speaks to; written by `baton local up`, yours to edit.", ""]
    lines += [f"current = {json.dumps(current)}"]
    for name, each in sorted(contexts.items()):
        lines += ["", f"[contexts.{name}]", f"endpoints = {json.dumps(list(each.endpoints))}"]
        lines += [f"{key} = {json.dumps(getattr(each, key))}" for key in _KEYS[1:] if getattr(each, key)]
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".contexts-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
            Path(draft).replace(path)
        except OSError:
            Path(draft).unlink(missing_ok=True)
            raise
    return path


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Within it, a file that cannot be written is InvalidField."""
    try:
        yield
    except OSError as error:
        fix = f"name another file with {CONFIG_VARIABLE}"
        raise InvalidField(f"{path}: cannot be written: {error.strerror or error}; {fix}") from None
