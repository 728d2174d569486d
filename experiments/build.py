"""The only place where a Hydra config meets certjax.

A config names keyword-only factories by `_target_` and holds numbers. Here they are
checked, in words that name the key, and called. certjax never sees a DictConfig.
"""

import contextlib
import difflib
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


PREFIX = "certjax."
RESERVED = ("_target_", "_partial_")
SCALARS = (bool, int, float, str, type(None))
FRACTION = re.compile(r"\s*([-+]?\d*\.?\d+)\s*/\s*(\d*\.?\d+)\s*")

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be run; the message names the key and the fix."""


def number(value: Any) -> Any:
    """`"8/255"` as a float; everything else unchanged."""
    match = FRACTION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    above, below = (float(part) for part in match.groups())
    if below == 0:
        raise ConfigError(f"cannot divide by zero in {value!r}")
    return above / below


def _numbers(node: Any) -> Any:
    """Every fraction in a tree of dicts and lists, as a float."""
    if isinstance(node, Mapping):
        return {str(key): _numbers(child) for key, child in node.items()}
    if isinstance(node, list):
        return [_numbers(child) for child in node]
    return number(node)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain Python, fractions such as 8/255 turned to floats."""
    try:
        tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    return _numbers(tree)


def _times(*factors: Any) -> float:
    """`${times:${attack_eps},0.25}` in YAML: a product, fractions allowed."""
    product = 1.0
    for factor in factors:
        product *= number(factor)
    return product


def register_resolvers() -> None:
    """Make `${times:a,b}` known to YAML."""
    OmegaConf.register_new_resolver("times", _times, replace=True)


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a (nested) union; a plain hint is its only one."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(m for part in typing.get_args(hint) for m in _members(part))
    return (hint,)


def _scalar_matches(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in SCALARS:
        return type(value) is hint
    return value is None and hint is None


def _list_matches(value: Any, hint: Any) -> bool:
    """Is `hint` a sequence type whose elements (if it names them) fit the value's?"""
    if (typing.get_origin(hint) or hint) not in (tuple, list, Sequence, Iterable):
        return False
    inner = typing.get_args(hint)
    return not inner or all(matches(element, inner[0]) for element in value)


def matches(value: Any, hint: Any) -> bool:
    """Does a config value fit a type hint? An int is a float; built objects pass."""
    return any(_member_matches(value, member) for member in _members(hint))


def _member_matches(value: Any, hint: Any) -> bool:
    if hint in (Any, inspect.Parameter.empty) or isinstance(hint, TypeVar):
        return True
    if isinstance(value, SCALARS):
        return _scalar_matches(value, hint)
    if type(value) in (list, tuple):  # a NamedTuple is a built object
        return _list_matches(value, hint)
    return hint not in SCALARS and typing.get_origin(hint) is not Literal


def _words(hint: Any) -> str:
    names = [str(getattr(m, "__name__", m)) for m in _members(hint)]
    return " or ".join("None" if name == "NoneType" else name for name in names)


def check_value(where: str, value: Any, hint: Any) -> None:
    """Raise `ConfigError` unless `value` fits `hint`."""
    if not matches(value, hint):
        raise ConfigError(
            f"`{where}` must be {_words(hint)}, got {value!r} "
            f"({type(value).__name__}); give a value of that type"
        )


def check_known(where: str, keys: Iterable[str], known: list[str]) -> None:
    """Raise `ConfigError` naming the first unknown key and its nearest neighbour."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            )
            raise ConfigError(f"unknown key `{key}` in {where}; {hint}")


def _locate(path: Any, where: str) -> Callable[..., Any]:
    """The certjax object a `_target_` names; nothing outside certjax is reachable."""
    if not isinstance(path, str) or not path.startswith(PREFIX):
        raise ConfigError(
            f"`{where}._target_` must name something in certjax, got {path!r}; "
            f"targets start with `{PREFIX}`"
        )
    module, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"`{where}._target_`: there is no {path!r}") from error
    home = getattr(target, "__module__", "") or ""
    if not callable(target) or not f"{home}.".startswith(PREFIX):
        raise ConfigError(f"`{where}._target_`: {path!r} is not a factory of certjax")
    return target


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a (partial) factory."""
    parameters = inspect.signature(target).parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in parameters.items() if p.kind not in variable}


def accepts(factory: Callable[..., Any], name: str) -> bool:
    """Does a (partial) factory have a parameter of this name?"""
    return name in parameters(factory)


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Type hints of a function or of the constructor of a class; {} if unreadable."""
    merged: dict[str, Any] = {}
    sources = (target, target.__init__) if inspect.isclass(target) else (target,)  # type: ignore[misc]
    for source in sources:
        try:
            merged |= typing.get_type_hints(source)
        except NameError:  # a forward reference that only its author can resolve
            continue
    return merged


def _child(node: Any, where: str) -> Any:
    if isinstance(node, Mapping) and "_target_" in node:
        return build(node, where=where)
    if isinstance(node, Mapping):
        return {key: _child(child, f"{where}.{key}") for key, child in node.items()}
    if isinstance(node, list):
        return [_child(child, f"{where}[{i}]") for i, child in enumerate(node)]
    return node


def build(node: Mapping[str, Any], *, where: str, **given: Any) -> Any:
    """Call the factory that `node` names, after checking every key and scalar.

    Args:
      node: plain config (see `plain`) with `_target_`; `_partial_: true` gives the
        factory with its numbers bound instead of calling it.
      where: the config key, for messages.
      **given: objects for the factory that configs cannot express, e.g. a threat.

    Raises:
      ConfigError: foreign target, unknown or missing key, wrong type, or a value the
        factory itself refuses.
    """
    target = _locate(node.get("_target_"), where)
    known, hints = parameters(target), _hints(target)
    numbers = {key: value for key, value in node.items() if key not in RESERVED}
    check_known(f"`{where}` ({node['_target_']})", numbers, list(known))
    arguments = {k: _child(v, f"{where}.{k}") for k, v in numbers.items()}
    for key, value in arguments.items():
        check_value(f"{where}.{key}", value, hints.get(key, Any))
    arguments = {
        k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()
    }
    arguments |= {key: value for key, value in given.items() if key in known}
    if node.get("_partial_", False):
        return functools.partial(target, **arguments)
    return _call(target, arguments, where)


@contextlib.contextmanager
def blamed(where: str) -> Iterator[None]:
    """Name the config key in what a factory refuses."""
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`{where}`: {error}") from error


def _call(target: Callable[..., Any], arguments: dict[str, Any], where: str) -> Any:
    with blamed(where):
        inspect.signature(target).bind(**arguments)
        return target(**arguments)


def settings(cls: type[T], config: Mapping[str, Any], *, where: str = "config") -> T:
    """A frozen dataclass of run settings from plain config; every key checked."""
    hints = _hints(cls)
    check_known(f"`{where}`", config, list(parameters(cls)))
    for key, value in config.items():
        check_value(
            key if where == "config" else f"{where}.{key}", value, hints.get(key, Any)
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    return _call(cls, values, where)
