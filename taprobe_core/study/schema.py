"""The JSON schema of a study, for completion and checks in an editor.

`studies/schema.json` is this schema; after a change to the models, write it again:

    python -m taprobe_core.study.schema > studies/schema.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

from taprobe_core.study.config import Study

REGENERATE = "python -m taprobe_core.study.schema > studies/schema.json"


def study_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a study."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Study.model_json_schema(),
        "title": "taprobe study",
    }


def schema_text() -> str:
    """Return the schema as it stands in `studies/schema.json`."""
    return json.dumps(study_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
