"""Renders our Kubernetes overlays as `kustomize build` does, as far as they use it. Anything else is refused."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]
_KNOWN = {"apiVersion", "kind", "namespace", "namePrefix", "resources", "labels", "images", "patches"}


def render(folder: Path) -> list[Resource]:
    """All resources of the kustomization in *folder*."""
    wanted: dict[str, Any] = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert wanted.keys() <= _KNOWN, f"not rendered here: {wanted.keys() - _KNOWN}"
    resources: list[Resource] = []
    for name in wanted["resources"]:
        path = folder / name
        resources += render(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for entry in wanted.get("patches", []):
        patch = yaml.safe_load((folder / entry["path"]).read_text())
        [number] = [number for number, each in enumerate(resources) if _identity(each) == _identity(patch)]
        resources[number] = _merged(resources[number], patch)
    for resource in resources:
        resource["metadata"]["name"] = wanted.get("namePrefix", "") + resource["metadata"]["name"]
        if "namespace" in wanted:
            resource["metadata"]["namespace"] = wanted["namespace"]
        for entry in wanted.get("labels", []):
            assert entry["includeSelectors"]
            _label(resource, entry["pairs"])
        for image in wanted.get("images", []):
            _name_image(resource, image)
    return resources


def _identity(resource: Resource) -> tuple[str, str]:
    return resource["kind"], resource["metadata"]["name"]


def _merged(base: Any, patch: Any) -> Any:
    """A strategic merge: lists of named entries are merged by name, the patch's first; other lists are replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {key: _merged(base.get(key), patch[key]) if key in patch else base[key] for key in {**base, **patch}}
    if isinstance(base, list) and isinstance(patch, list) and all(_is_named(each) for each in base + patch):
        old, new = ({each["name"]: each for each in entries} for entries in (base, patch))
        return [_merged(old.get(name), new[name]) if name in new else old[name] for name in {**new, **old}]
    return deepcopy(patch)


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and "name" in entry


def _label(resource: Resource, pairs: dict[str, str]) -> None:
    metadata, spec = resource["metadata"], resource["spec"]
    metadata["labels"] = {**metadata.get("labels", {}), **pairs}
    if resource["kind"] == "Service":
        spec["selector"] = {**spec["selector"], **pairs}
        return
    spec["selector"]["matchLabels"] = {**spec["selector"]["matchLabels"], **pairs}
    if "template" in spec:
        template = spec["template"]
        template["metadata"]["labels"] = {**template["metadata"]["labels"], **pairs}
        for constraint in template["spec"]["topologySpreadConstraints"]:
            selector = constraint["labelSelector"]
            selector["matchLabels"] = {**selector["matchLabels"], **pairs}


def _name_image(resource: Resource, image: dict[str, str]) -> None:
    for container in resource["spec"].get("template", {}).get("spec", {}).get("containers", []):
        if container["image"] == image["name"]:
            container["image"] = f"{image['newName']}:{image['newTag']}"
