"""Braces in a path stand for several files, as a shell, WebDataset and NeMo write them: {000..012}, {train,dev}."""

import re

NEMO = (("_OP_", "{"), ("_CL_", "}"))
"""The marks that NeMo writes for braces, since a shell would expand these."""
RANGE = re.compile(r"(?P<first>-?\d+|[A-Za-z])\.\.(?P<last>-?\d+|[A-Za-z])(?:\.\.(?P<step>-?\d+))?")


def expand(text: str) -> list[str]:
    """Returns the texts that one with braces stands for, in the order of a shell; a text without them alone.

    Examples:
        >>> expand("{train,dev}/{08..10}.tar")[2:4]
        ['train/10.tar', 'dev/08.tar']
        >>> expand("{{0..1},5}.tar")
        ['0.tar', '1.tar', '5.tar']
    """
    for theirs, sign in NEMO:
        text = text.replace(theirs, sign)
    for start, sign in enumerate(text):
        if sign == "{" and (parts := _parts(text, start)):
            end = start + sum(map(len, parts)) + len(parts) + 1
            named = _range(parts[0]) if len(parts) == 1 else [name for part in parts for name in expand(part)]
            if named:
                return [text[:start] + name + rest for name in named for rest in expand(text[end:])]
    return [text]


def stand_in(text: str) -> bool:
    """Returns whether a text has braces that stand for several texts, or for one with another name."""
    return expand(text) != [text]


def _parts(text: str, start: int) -> list[str]:
    """Returns what stands between the commas of a brace and the one that closes it; nothing if none does."""
    depth, parts, begun = 0, [], start + 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0 or (depth == 1 and text[place] == ","):
            parts.append(text[begun:place])
            begun = place + 1
        if depth == 0:
            return parts
    return []


def _range(text: str) -> list[str]:
    """Returns the numbers or letters of a range; nothing for a text that is none."""
    found = RANGE.fullmatch(text)
    if found is None or found["first"].isalpha() != found["last"].isalpha():
        return []
    letters = found["first"].isalpha()
    first, last = (ord(end) if letters else int(end) for end in (found["first"], found["last"]))
    step = abs(int(found["step"] or 1)) or 1
    values = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if letters:
        return [chr(value) for value in values]
    padded = any(re.match("-?0.", end) for end in (found["first"], found["last"]))
    width = max(len(found["first"]), len(found["last"])) if padded else 0
    return [f"{value:0{width}d}" for value in values]
