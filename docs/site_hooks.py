"""MkDocs hooks: the site has the layout of the repository, so that one set of relative links serves both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from steplm.config import config_schema

ROOT = Path(__file__).parents[1]
SHOWN = ("*.md", "LICENSE", "docs/**/*", "results/**/*", "recipes/**/*", "examples/*", "benchmarks/*.py")


def on_config(config: MkDocsConfig) -> None:
    """List the tables and findings of the measured results below their overview."""
    assert config.nav is not None
    (results,) = (section["Results"] for section in config.nav if "Results" in section)
    results += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("results/*/*.md"))


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Replace the files of ``docs/`` by those of the repository, under their paths in it."""
    for file in files.documentation_pages() + files.media_files():
        if file.abs_src_path and Path(file.abs_src_path).is_relative_to(ROOT / "docs"):
            files.remove(file)
    for path in sorted({path for pattern in SHOWN for path in ROOT.glob(pattern) if path.is_file()}):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "docs/configuration.md", content=configuration_page()))


def configuration_page() -> str:
    """Every key of ``run.yaml``: type, default and description, from the JSON schema."""
    schema = config_schema()
    definitions = schema["$defs"]
    top, sections = [], []
    for name, entry in schema["properties"].items():
        references = [option["$ref"] for option in entry.get("anyOf", []) if "$ref" in option]
        if references:
            sections.append((name, definitions[references[0].rpartition("/")[2]]))
        else:
            top.append((name, entry))
    lines = [
        "# Configuration keys",
        "",
        "Made from the schema that `steplm schema` prints. Override any key on the command line: `section.key=value`.",
        "",
        *_table(top, ""),
    ]
    for name, section in sections:
        lines += ["", f"## {name}", "", section.get("description", ""), ""]
        lines += _table(section["properties"].items(), f"{name}.")
    return "\n".join(lines) + "\n"


def _table(entries: Any, prefix: str) -> list[str]:
    rows = ["| key | values | default | |", "| --- | --- | --- | --- |"]
    for name, entry in entries:
        default = f"`{_yaml(entry['default'])}`" if entry.get("default") not in (None, {}) else ""
        cells = [f"`{prefix}{name}`", _values(entry), default, entry.get("description", "")]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _values(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if "anyOf" in entry or "oneOf" in entry:
        options = entry.get("anyOf", entry.get("oneOf"))
        return " or ".join(dict.fromkeys(_values(option) for option in options if option.get("type") != "null"))
    if entry.get("type") == "array":
        return f"list of {_values(entry.get('items', {}))}"
    if "pattern" in entry and "[0-9]" in entry["pattern"]:
        return "number with a unit"
    name = entry.get("type", entry.get("$ref", "value").rpartition("/")[2])
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    return " ".join([name, *(f"{sign} {entry[key]}" for key, sign in bounds.items() if key in entry)])


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
