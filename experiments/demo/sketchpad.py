"""A sketchpad for the demo page, and the images of what is drawn on it.

A drawing is the text of an SVG path, 'M10 20L30 40M50 60L50 60': a stroke begins with M, and its
coordinates are pixels. Gradio's own sketchpad needs WebGL, which takes seconds for a stroke where
there is no graphics card.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

CANVAS = 280  # pixels
_PEN = 12  # pixels
# White around a cropped drawing, as a share of its longer side: ink then fills 62 % of the box's
# side, as Omniglot's characters do (60 % in the median).
_MARGIN = 0.3
_SMALLEST = 0.2  # share of the canvas below which a drawing is not enlarged: a dot stays a dot

_TEMPLATE = f"""
<div class="pad-title">${{label}}</div>
<svg class="pad" viewBox="0 0 {CANVAS} {CANVAS}" role="img" aria-label="${{label}}">
  <path d="${{value}}" fill="none" stroke="black" stroke-width="{_PEN}" stroke-linecap="round"
    stroke-linejoin="round"/>
</svg>
<div><button data-pad="undo">Undo</button><button data-pad="clear">Clear</button></div>
"""

_CSS = f"""
.pad-title {{ font-size: 0.9em; opacity: 0.8; }}
svg {{
  width: 100%; max-width: {CANVAS}px; aspect-ratio: 1; display: block; margin: 0.4em 0;
  background: white; border: 1px solid #9ca3af; border-radius: 6px; cursor: crosshair;
  touch-action: none;
}}
button {{
  margin-right: 0.5em; padding: 0 0.8em; border: 1px solid #9ca3af; border-radius: 6px;
  font-size: 0.85em; font-weight: normal;
}}
"""

# `element`, `props` and `trigger` are Gradio's. The template is drawn anew when the value changes,
# so that listeners belong to the element around it.
_SCRIPT = f"""
let drawn = null;  // the path while the pen is down
const svg = () => element.querySelector('svg.pad');
const share = (at, start, length) => Math.min(Math.max((at - start) / length, 0), 1);
const point = (event) => {{
  const box = svg().getBoundingClientRect();
  const x = share(event.clientX, box.left, box.width);
  const y = share(event.clientY, box.top, box.height);
  return Math.round(x * {CANVAS}) + ' ' + Math.round(y * {CANVAS});
}};
const show = () => svg().querySelector('path').setAttribute('d', drawn);
const finish = (path) => {{ drawn = null; props.value = path; trigger('input'); }};
element.addEventListener('pointerdown', (event) => {{
  if (event.button !== 0 || !event.target.closest('svg.pad')) return;
  event.preventDefault();
  svg().setPointerCapture(event.pointerId);
  drawn = (props.value || '') + 'M' + point(event) + 'L' + point(event);
  show();
}});
element.addEventListener('pointermove', (event) => {{
  if (drawn === null) return;
  drawn += 'L' + point(event);
  show();
}});
element.addEventListener('pointerup', () => {{ if (drawn !== null) finish(drawn); }});
element.addEventListener('pointercancel', () => {{ if (drawn !== null) finish(drawn); }});
element.addEventListener('click', (event) => {{
  const action = event.target.dataset.pad, path = props.value || '';
  if (action === 'undo') finish(path.slice(0, Math.max(path.lastIndexOf('M'), 0)));
  if (action === 'clear') finish('');
}});
"""


def sketchpad(gr: Any, label: str, elem_id: str) -> Any:
    """Builds a sketchpad.

    Args:
      gr: The module gradio.
      label: Title above it.
      elem_id: Its id on the page.

    Returns:
      A component whose value is a drawing; its event `input` follows every stroke.
    """
    return gr.HTML(
        "",
        label=label,
        html_template=_TEMPLATE,
        css_template=_CSS,
        js_on_load=_SCRIPT,
        elem_id=elem_id,
    )


def strokes(drawing: str | None) -> list[list[tuple[int, int]]]:
    """The points of each stroke of a drawing.

    Examples:
      >>> strokes("M10 20L30 40M50 60L50 60")
      [[(10, 20), (30, 40)], [(50, 60), (50, 60)]]
    """
    found = []
    for stroke in (drawing or "").split("M")[1:]:
        points = re.findall(r"(\d+) (\d+)", stroke)
        found.append([(int(x), int(y)) for x, y in points])
    return [points for points in found if points]


def draw(drawing: str | None) -> "Image | None":
    """The image of a drawing, black on white, cropped to its ink; None where nothing is drawn."""
    from PIL import Image, ImageDraw

    lines = strokes(drawing)
    if not lines:
        return None
    # Ink at the canvas's edge is as thick as elsewhere.
    image = Image.new("L", (CANVAS + 2 * _PEN, CANVAS + 2 * _PEN), "white")
    pen = ImageDraw.Draw(image)
    for points in lines:
        shifted = [(x + _PEN, y + _PEN) for x, y in points]
        pen.line(shifted, fill="black", width=_PEN, joint="curve")
        for point in (shifted[0], shifted[-1]):
            pen.circle(point, _PEN / 2, fill="black")
    return crop_to_ink(image)


def crop_to_ink(image: "Image") -> "Image":
    """Crops a drawing to its ink with a margin, as a square.

    A learner of characters expects that one fills most of its box, wherever it was drawn.

    Args:
      image: Grey, dark strokes on white.
    """
    from PIL import Image, ImageOps

    box = ImageOps.invert(image).getbbox() or (0, 0, 1, 1)
    width, height = box[2] - box[0], box[3] - box[1]
    longer = max(width, height, round(_SMALLEST * max(image.size)))
    side = round(longer * (1 + 2 * _MARGIN))
    square = Image.new("L", (side, side), "white")
    square.paste(image.crop(box), ((side - width) // 2, (side - height) // 2))
    return square
