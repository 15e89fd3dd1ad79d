"""What the Hub demands of the metadata of a model card, as far as its documentation says: checked without the Hub.

https://github.com/huggingface/hub-docs/blob/main/modelcard.md and https://huggingface.co/docs/hub/repositories-licenses
"""

from __future__ import annotations

import re
from typing import Any

import yaml

KNOWN = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(KNOWN.split())
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def metadata_errors(card: str) -> list[str]:
    """Everything the Hub would refuse a card for."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        return ["metadata is missing"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"metadata is not YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata is no mapping"]
    errors = []
    if "license" in data and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of the known ones, not {data["license"]!r}')
    if data.get("license") == "other" and not isinstance(data.get("license_name"), str):
        errors.append('"license_name" is required with license "other"')
    if "license_name" in data and not re.fullmatch(r"[a-z0-9-.]+", str(data["license_name"])):
        errors.append('"license_name" must be lower case')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    for key in ("base_model", "datasets"):
        for name in _listed(data.get(key)):
            if not isinstance(name, str) or not REPO_ID.fullmatch(name):
                errors.append(f'"{key}" must be ids on the Hub, not {name!r}')
    for key in ("tags", "metrics"):
        if any(not isinstance(item, str) for item in _listed(data.get(key))):
            errors.append(f'"{key}" must be texts')
    if any(
        not re.fullmatch(r"[a-z]{2,3}(-\w+)?|code|multilingual", str(item)) for item in _listed(data.get("language"))
    ):
        errors.append('"language" must be ISO 639 codes')
    for key in ("library_name", "pipeline_tag", "license_link"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a text')
    return errors + _index_errors(data.get("model-index", []))


def _index_errors(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be a list']
    errors = []
    for model in index:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append('"model-index[].name" is required')
            continue
        for result in model.get("results", []):
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                missing = [key for key in keys if not isinstance(result.get(part, {}).get(key), str)]
                errors += [f'"model-index[].results[].{part}.{key}" is required' for key in missing]
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append('"model-index[].results[].metrics" is required')
            for metric in metrics or []:
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    errors.append('"model-index[].results[].metrics[]" needs a type and a value')
                elif isinstance(metric["value"], float) and metric["value"] != metric["value"]:
                    errors.append('"model-index[].results[].metrics[].value" is no number')
    return errors


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
