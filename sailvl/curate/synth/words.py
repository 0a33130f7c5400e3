"""What the generators say, in English and Chinese. Values only."""

from __future__ import annotations

from typing import Literal

Lang = Literal["en", "zh"]
Pair = dict[Lang, str]

# Far enough apart that a colour has one right name, also for people with the common colour deficiencies.
COLOURS: dict[str, tuple[tuple[int, int, int], Pair]] = {
    "red": ((214, 40, 40), {"en": "red", "zh": "红色"}),
    "orange": ((245, 140, 30), {"en": "orange", "zh": "橙色"}),
    "yellow": ((250, 220, 60), {"en": "yellow", "zh": "黄色"}),
    "green": ((50, 150, 70), {"en": "green", "zh": "绿色"}),
    "blue": ((40, 90, 200), {"en": "blue", "zh": "蓝色"}),
    "purple": ((130, 60, 170), {"en": "purple", "zh": "紫色"}),
    "black": ((25, 25, 25), {"en": "black", "zh": "黑色"}),
    "white": ((250, 250, 250), {"en": "white", "zh": "白色"}),
}

# Kinds that a picture of an unseen thing can be sorted into by eye, and that hold enough concepts to test with: key of
# the corpus -> singular, plural, Chinese.
KINDS: dict[str, tuple[str, str, str]] = {
    "animal": ("animal", "animals", "动物"),
    "food": ("food", "foods", "食物"),
    "flag": ("flag", "flags", "旗帜"),
    "vehicle": ("vehicle", "vehicles", "交通工具"),
    "person": ("person", "people", "人"),
}

NUMBERS: dict[Lang, tuple[str, ...]] = {
    "en": ("Zero", "One", "Two", "Three", "Four", "Five"),
    "zh": ("零", "一", "两", "三", "四", "五"),
}

DIRECTIONS: dict[str, Pair] = {
    "left": {"en": "left", "zh": "左边"},
    "right": {"en": "right", "zh": "右边"},
    "above": {"en": "above", "zh": "上方"},
    "below": {"en": "below", "zh": "下方"},
}
MOTIONS: dict[str, Pair] = {
    "left": {"en": "left", "zh": "向左"},
    "right": {"en": "right", "zh": "向右"},
    "up": {"en": "up", "zh": "向上"},
    "down": {"en": "down", "zh": "向下"},
}
ORDINALS: dict[str, Pair] = {"first": {"en": "first", "zh": "第一张"}, "second": {"en": "second", "zh": "第二张"}}
YES_NO: dict[bool, Pair] = {True: {"en": "yes", "zh": "是"}, False: {"en": "no", "zh": "否"}}

# The first wording of each question is the one tests use; training draws any.
ASK: dict[str, dict[Lang, tuple[str, ...]]] = {
    "caption": {
        "en": ("Describe the picture.", "What does the picture show?", "Write a caption."),
        "zh": ("描述这张图片。", "图片里有什么?", "给图片写一句说明。"),
    },
    "describe": {
        "en": ("Describe everything exactly.",),
        "zh": ("准确描述所有内容。",),
    },
    "name": {
        "en": ("What kind of thing is this?", "What kind of thing does the picture show?"),
        "zh": ("这是什么种类的东西?", "图中的东西属于哪一类?"),
    },
    "background": {
        "en": ("What colour is the background?", "Which colour is behind everything?"),
        "zh": ("背景是什么颜色?", "图片的底色是什么?"),
    },
    "ball": {"en": ("What colour is the ball?",), "zh": ("球是什么颜色?",)},
    "count": {
        "en": ("How many things are there?", "Count the things in the picture."),
        "zh": ("图中有几个东西?", "数一数图中的东西。"),
    },
    "where": {
        "en": ("Where is the {thing}?", "Give the box of the {thing}."),
        "zh": ("{thing}在哪里?", "给出{thing}的位置框。"),
    },
    "relation": {
        "en": ("Where is the {thing}, seen from the ball?", "On which side of the ball is the {thing}?"),
        "zh": ("{thing}在球的哪一边?", "从球看,{thing}在哪边?"),
    },
    "ocr": {
        "en": ("Read the text.", "What is written here?"),
        "zh": ("读出文字。", "图中写着什么?"),
    },
    "chart-most": {"en": ("Which bar is the highest?",), "zh": ("哪根柱子最高?",)},
    "chart-least": {"en": ("Which bar is the lowest?",), "zh": ("哪根柱子最低?",)},
    "chart-value": {"en": ("What is the value of the {colour} bar?",), "zh": ("{colour}柱子的值是多少?",)},
    "table": {
        "en": ("What is in row {row}, column {column}?",),
        "zh": ("第{row}行{column}列是什么?",),
    },
    "arithmetic": {"en": ("What is the result?", "Calculate."), "zh": ("结果是多少?", "计算一下。")},
    "compare-more": {
        "en": ("Which picture shows more things, the first or the second?",),
        "zh": ("哪张图里的东西更多,第一张还是第二张?",),
    },
    "compare-colour": {
        "en": ("Do both pictures have the same background colour?",),
        "zh": ("两张图的背景颜色相同吗?",),
    },
    "clip": {"en": ("Which way does it move?",), "zh": ("它往哪个方向移动?",)},
}

# Characters for lines of text. Latin without look-alikes in a small font; the most frequent Chinese nouns' characters.
LATIN = "ABCDEFGHJKLMNPRSTUVWXYZ"
DIGITS = "0123456789"
HANZI = "一二三大小上下人山水火木日月天口手车马牛"
