"""What is in the binary besides our own code: names, versions, licences, sums. For the packages, and as an SBOM."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import marshal
import re
import struct
import sys
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_LICENCES = HERE / "licences"
_OURS = {"supervisor", "entry"}
_PYZ = re.compile(rb"PYZ\0..\r\n", re.DOTALL)  # what it begins with, the number of Python's byte code in it


class UnknownComponent(Exception):
    """The binary holds something that licences/components.toml does not name."""


@dataclasses.dataclass(frozen=True)
class Component:
    """Something by others in the binary."""

    name: str
    version: str
    licence: str  # SPDX
    text: str
    origin: str  # a package URL
    sums: dict[str, str]  # SHA-256 of what it was taken from, by its file's name, or of several of which one was


def modules(program: Path) -> set[str]:
    """The names of all Python modules in the binary, by the program of its onedir form."""
    data = program.read_bytes()
    begin = _PYZ.search(data)
    assert begin, f"{program} holds no Python modules"
    archive = data[begin.start() :]
    (table,) = struct.unpack_from("!I", archive, 8)
    return {name for name, _ in marshal.loads(archive[table:])}  # noqa: S302 - our own file


def components(onedir: Path, *, strict: bool = False) -> list[Component]:
    """All that components.toml names and the binary holds, by name. When `strict`, raises `UnknownComponent`."""
    inside = _OURS | {name.partition(".")[0] for name in modules(onedir / "flow-agent")}
    internal = onedir / "_internal"
    files = {path.name: path for path in internal.iterdir()}
    held = inside | {name.partition(".")[0] for name in files}  # packages that are compiled throughout are mere files
    found, explained = [], set(_OURS)
    for name, about in tomllib.loads((_LICENCES / "components.toml").read_text()).items():
        file = next((name for name in about.get("files", {}) if name in files), None)
        own = {name.replace("-", "_")} | ({"attr"} if name == "attrs" else set())
        explained |= own
        is_absent = file is None if "files" in about else _pinned_package(name) and not own & held
        if is_absent:
            continue
        version, origin, sums = _pinned(name) or (about["files"][file], f"pkg:generic/{name.lower()}", {})
        if file:
            version = version or _sqlite_version(files[file])
            sums = {file: hashlib.sha256(files[file].read_bytes()).hexdigest()}
        text = (_LICENCES / f"{name}.txt").read_text()
        found.append(Component(name, version, about["licence"], text, f"{origin}@{version}", sums))
    strange = {name for name in inside - explained - sys.stdlib_module_names if not name.startswith("_")}
    if strict and strange:
        raise UnknownComponent(f"in the binary, and not in components.toml: {', '.join(sorted(strange))}")
    return sorted(found, key=lambda component: component.name.lower())


def _requirements() -> str:
    return (HERE / "binary/requirements.txt").read_text()


def _pinned_package(name: str) -> re.Match[str] | None:
    return re.search(rf"^{re.escape(name)}==(\S+) \\\n((?:    --hash=\S+(?: \\)?\n)+)", _requirements(), re.MULTILINE)


def _pinned(name: str) -> tuple[str, str, dict[str, str]] | None:
    for source in tomllib.loads((HERE / "binary/sources.toml").read_text())["source"]:
        if source["name"] == name:
            return source["version"], f"pkg:generic/{name.lower()}", source["files"]
    if found := _pinned_package(name):
        sums = re.findall(r"sha256:(\w+)", found[2])
        return found[1], f"pkg:pypi/{name}", {f"wheel {number}": digest for number, digest in enumerate(sums, 1)}
    return None


def _sqlite_version(library: Path) -> str:
    found = re.search(rb"(?<!\d)(3\.\d+\.\d+)\0", library.read_bytes())
    assert found, f"{library} does not say its version"
    return found[1].decode()


def notices(onedir: Path) -> str:
    """Every licence's text, under the names and versions of what it is for."""
    return "\n".join(_notices(components(onedir)))


def _notices(found: list[Component]) -> Iterator[str]:
    yield "The program in this package contains the following, each under its own licence.\n"
    yield from (f"  {component.name} {component.version}: {component.licence}" for component in found)
    for component in found:
        yield f"\n{'=' * 79}\n{component.name} {component.version}: {component.licence}\n{'=' * 79}\n"
        yield component.text.rstrip()
    yield ""


def sbom(onedir: Path, version: str, time: str, *programs: Path) -> str:
    """The same, and every file of the binary, as CycloneDX 1.6. `time` as 2026-01-31T00:00:00Z. Raises `UnknownComponent`."""
    own = {
        "type": "application",
        "bom-ref": "flow-agent",
        "name": "flow-agent",
        "version": version,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "purl": f"pkg:generic/flow-agent@{version}",
    }
    others = components(onedir, strict=True)
    files = [*programs, *sorted(path for path in onedir.rglob("*") if path.is_file() and not path.is_symlink())]
    entries = [_entry(component) for component in others] + [_file(path, onedir) for path in files]
    document: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"timestamp": time, "component": own},
        "components": entries,
        "dependencies": [{"ref": "flow-agent", "dependsOn": sorted(entry["bom-ref"] for entry in entries)}],
    }
    # Tells documents apart, and is the same for the same content.
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(document, sort_keys=True))}"
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _entry(component: Component) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "library",
        "bom-ref": component.origin,
        "name": component.name,
        "version": component.version,
        "purl": component.origin,
        "licenses": [_licence(component.licence)],
    }
    if component.origin.startswith("pkg:pypi/"):
        page = f"https://pypi.org/project/{component.name}/{component.version}/"
        entry["externalReferences"] = [_distribution(page, list(component.sums.values()))]
    elif len(component.sums) == 1 and next(iter(component.sums)).startswith("lib"):
        entry["hashes"] = [_sha256(digest) for digest in component.sums.values()]
    else:
        entry["externalReferences"] = [_distribution(file, [digest]) for file, digest in component.sums.items()]
    return entry


def _licence(spdx: str) -> dict[str, Any]:
    return {"expression": spdx} if " " in spdx else {"license": {"id": spdx}}


def _distribution(url: str, digests: list[str]) -> dict[str, Any]:
    return {"type": "distribution", "url": url, "hashes": [_sha256(digest) for digest in digests]}


def _file(path: Path, onedir: Path) -> dict[str, Any]:
    name = f"onedir/{path.relative_to(onedir)}" if path.is_relative_to(onedir) else path.name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [_sha256(digest)]}


def _sha256(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}
