"""Label configs: what Label Studio draws. Made from a schema, and read to see which controls there are.

Answers of models are shown by `Text` and `Paragraphs` alone, which show markup as it is written; `HyperText` would run
it in the reviewer's browser, and is refused in a config of one's own too.
"""

import xml.etree.ElementTree as ET
from typing import NamedTuple

from resources.errors import SettingsError
from resources.label_studio.schema import CurationSchema, DataSource, Question

# What is empty, and a conversation that is the prompt alone, is not shown; of a conversation neither the times nor the
# tools to mark parts of it are. Buttons that edit a text are seen before the pointer is over them.
_STYLE = """
.vb-page { max-width: 960px; margin: 0 auto; }
.vb-source { white-space: pre-wrap; background: #f7f7f9; border-radius: 6px; padding: 8px 12px; margin-bottom: 12px;
  max-height: 60vh; overflow-y: auto; }
.vb-part:has(.lsf-richtext__line:only-child:empty) { display: none; }
.vb-part:has([data-testid="phrase:0"]):not(:has([data-testid="phrase:1"])) { display: none; }
.vb-source [class*="authorFilter"], .vb-source [class*="time--"], .vb-source [class*="selectAllBtn"] { display: none; }
.vb-question [data-testid="htx-textbox-actions"] { opacity: 1 !important; visibility: visible !important; }
.vb-question [data-testid="htx-textbox-content"] { padding-right: 90px !important; }
.vb-question { margin: 14px 0; }
.vb-hint * { color: #666; font-size: 14px !important; font-weight: 400 !important; margin: 2px 0; }
"""
_REFUSED = {"HyperText", "Html"}


class Control(NamedTuple):
    """What a reviewer's answer hangs on in Label Studio: a name, the object it is about and its kind."""

    name: str
    to_name: str
    type: str


def make_label_config(schema: CurationSchema) -> str:
    """The label config of a schema: its own where it has one.

    Raises:
        SettingsError: its own config is not valid; says what is wrong.
    """
    if schema.label_config is not None:
        controls = parse_controls(schema.label_config)
        missing = {question.id for question in schema.questions} - {control.name for control in controls}
        if missing:
            names = ", ".join(sorted(missing))
            raise SettingsError(f"schema {schema.id}: `label_config` has no control for the questions {names}.")
        return schema.label_config
    view = ET.Element("View", className="vb-page")
    ET.SubElement(view, "Style").text = _STYLE
    for source in schema.data_sources:
        _add_source(view, source)
    for question in schema.questions:
        _add_question(view, question, f"{schema.rendering.about}_shown")
    ET.indent(view)
    return ET.tostring(view, encoding="unicode")


def parse_controls(config: str) -> list[Control]:
    """The controls of a label config.

    Raises:
        SettingsError: not XML, a control about an object that is not there, or a tag that runs markup of a model.
    """
    try:
        root = ET.fromstring(config)
    except ET.ParseError as error:
        raise SettingsError(f"A label config is not XML: {error}.") from None
    named = {tag.get("name") for tag in root.iter() if tag.get("name")}
    controls = []
    for tag in root.iter():
        if tag.tag in _REFUSED:
            raise SettingsError(f"A label config must not use <{tag.tag}>: it runs markup that a model has written.")
        about = tag.get("toName")
        if about is None:
            continue
        for name in about.split(","):
            if name not in named:
                raise SettingsError(f"Control `{tag.get('name')}` of a label config is about `{name}`, which it lacks.")
        controls.append(Control(str(tag.get("name")), about, tag.tag.lower()))
    return controls


def lost_controls(before: str, after: str) -> list[str]:
    """Names of controls that `after` lacks, or has of another kind: answers to them would hang in the air."""
    kept = {(control.name, control.type) for control in parse_controls(after)}
    return [control.name for control in parse_controls(before) if (control.name, control.type) not in kept]


def control_of(question: Question, about: str) -> Control:
    kinds = {"choice": "choices", "boolean": "choices", "rating": "rating", "number": "number"}
    return Control(question.id, f"{about}_shown", kinds.get(question.type, "textarea"))


def _add_source(view: ET.Element, source: DataSource) -> None:
    title = source.title or source.field
    part = ET.SubElement(view, "View", className="vb-part")
    if source.collapsed:
        part = ET.SubElement(ET.SubElement(part, "Collapse"), "Panel", value=title)
    else:
        ET.SubElement(part, "Header", value=title, size="4")
    box = ET.SubElement(part, "View", className="vb-source")
    name, value = f"{source.field}_shown", f"${source.field}"
    if source.kind == "conversation":
        ET.SubElement(box, "Paragraphs", name=name, value=value, layout="dialogue", nameKey="role", textKey="content")
    else:
        ET.SubElement(box, "Text", name=name, value=value)


def _add_question(view: ET.Element, question: Question, about: str) -> None:
    box = ET.SubElement(view, "View", className="vb-question")
    if question.options != (question.title,):
        ET.SubElement(box, "Header", value=question.title or question.id, size="5")
    if question.hint:
        hint = ET.SubElement(box, "View", className="vb-hint")
        ET.SubElement(hint, "Header", value=question.hint, size="6")
    shared = {"name": question.id, "toName": about} | ({"required": "true"} if question.required else {})
    match question.type:
        case "choice" | "boolean":
            several = question.multiple or len(question.choices) == 1
            tag = ET.SubElement(box, "Choices", shared | {"choice": "multiple" if several else "single"})
            tag.set("showInline", "true")
            for option in question.choices:
                ET.SubElement(tag, "Choice", value=option)
        case "rating":
            ET.SubElement(box, "Rating", shared | {"maxRating": str(question.max)})
        case "number":
            ET.SubElement(box, "Number", shared)
        case "text" | "structured":
            ET.SubElement(
                box, "TextArea", shared | {"rows": str(question.rows), "maxSubmissions": "1", "editable": "true"}
            )
