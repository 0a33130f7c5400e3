# ruff: noqa: E501 (literal tables: Chinese characters count twice)
"""Sentences of the kinds the nano model reads and writes, to train its tokenizer on.

They make "left of", "how many", "bar chart", 左边, 多少 and the names of colours and things single tokens. The words are
what matters here, so the sentences are filled at random (seeded) with names of the corpus.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色", "pink": "粉色",
    "brown": "棕色", "black": "黑色", "white": "白色", "gray": "灰色", "grey": "灰色", "cyan": "青色", "gold": "金色",
    "light": "浅色", "dark": "深色", "silver": "银色", "magenta": "品红", "beige": "米色", "navy": "深蓝",
}  # fmt: skip
NUMBERS = {
    "zero": "零", "one": "一", "two": "两", "three": "三", "four": "四", "five": "五", "six": "六", "seven": "七",
    "eight": "八", "nine": "九", "ten": "十", "eleven": "十一", "twelve": "十二",
}  # fmt: skip
PLACES = {
    "left": "左边", "right": "右边", "top": "上方", "bottom": "下方", "above": "上面", "below": "下面", "center": "中间",
    "top left": "左上角", "top right": "右上角", "bottom left": "左下角", "bottom right": "右下角", "middle": "中央",
    "upper left": "左上方", "lower right": "右下方", "under": "下边", "over": "上边", "beside": "旁边", "inside": "里面",
    "outside": "外面", "between": "之间", "behind": "后面", "in front of": "前面", "near": "附近", "next to": "紧挨着",
}  # fmt: skip
SHAPES = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "rectangle": "长方形", "star": "五角星", "diamond": "菱形",
    "hexagon": "六边形", "pentagon": "五边形", "ellipse": "椭圆", "cross": "十字", "heart": "心形", "arrow": "箭头",
    "ring": "圆环", "line": "直线", "angle": "角", "cube": "立方体", "sphere": "球体", "polygon": "多边形",
}  # fmt: skip
CHARTS = {
    "bar chart": "柱状图", "line chart": "折线图", "pie chart": "饼图", "scatter plot": "散点图", "histogram": "直方图",
    "table": "表格", "area chart": "面积图", "heat map": "热力图", "box plot": "箱线图", "diagram": "示意图",
}  # fmt: skip
MOTIONS = {
    "moves": "移动", "rises": "上升", "falls": "下降", "turns": "转动", "rotates": "旋转", "grows": "变大",
    "shrinks": "变小", "appears": "出现", "disappears": "消失", "blinks": "闪烁", "bounces": "弹跳", "stays still": "静止不动",
    "slides": "滑动", "spins": "自转", "jumps": "跳动", "fades": "变淡", "leaves": "离开", "enters": "进入",
    "changes colour": "变色", "moves clockwise": "顺时针移动", "moves counterclockwise": "逆时针移动",
}  # fmt: skip

ENGLISH = (
    "Describe the image. The image shows a {name} and a {other} on a {colour} background.",
    "Describe this picture in one sentence. A {colour} {name} is on the {place} of the picture, and a {other} is below it.",
    "Write a short caption for the picture. There are {number} {name} in the picture. This is a drawing of a {name}.",
    "What is this? What is in the picture? What does the picture show? It is a {name}. This is a {other}.",
    "Name it. Name the object in the image. The object is a {name}. What kind of thing is it? A kind of {category}.",
    "What colour is the {name}? The {name} is {colour}. What color is the background? The background is {colour}.",
    "Which object is {colour}? The {colour} one is the {name}. How many objects are there? There are {number}.",
    "How many {name} are there in the image? Count the {other}. There are {number} of them. The answer is {digit}.",
    "Where is the {name}? It is in the {place} of the image. Is the {name} to the left of the {other}? Yes. No.",
    "What is to the {place} of the {name}? The {other}. Which one is larger? The {name} is bigger than the {other}.",
    "Is the {name} above the {other}? Is the {name} below the {other}? It is to the right of the {other}.",
    "Give the bounding box of the {name} as [x1, y1, x2, y2]. [{digit}, {digit}, {digit}, {digit}] Point to the {name}.",
    "What does the text say? Read the text in the image. The text says. What is written on the sign? Transcribe the line.",
    "Which {shape} is {colour}? Is the {colour} {shape} larger than the {shape}? The {shape} is {place} the {shape}.",
    "According to the {chart}, what is the value of {name}? The value is {digit}.{digit}. Which bar is the highest?",
    "What is the title of the {chart}? Which category has the lowest value? The largest value minus the smallest is {digit}.",
    "What is the total? What is the difference? What is the average? How much more is {name} than {other}? The sum is {digit}.",
    "In the table, what is in row {digit}, column {digit}? Which row has the maximum? Which country has the minimum?",
    "Calculate {digit} + {digit} = {digit}. What is {digit} x {digit}? Compute {digit} - {digit}. The result is {digit}.",
    "Solve the problem step by step. First, add {digit} and {digit}. Then subtract. Therefore, the answer is {digit}.",
    "Compare the two pictures. What is the difference between Image-1 and Image-2? The first picture has a {name}; "
    "the second picture has a {other}. Which picture contains a {name}? The same. Different. Both. Neither. None.",
    "Are the two images the same? What changed from the first image to the second? The {name} was added. It was removed.",
    "What happens in the video? In the clip, the {name} {motion} from left to right, then {motion}. Frame-1: Frame-2:",
    "In which direction does the {name} move? It {motion} towards the {place}. Which frame is it? before after first last",
    "How many times does the {name} appear? The {other} {motion} before the {name} {motion}. Which happens first?",
    "Choose the correct answer. Answer with the letter. A. {name} B. {other} C. {colour} D. {shape} Options: Question:",
    "Answer the question using a single word or phrase. Answer briefly. Answer with a number. Answer yes or no. Please",
    "Which country does this flag belong to? The flag of {name}. The capital of {name} is. Which continent? Asia Europe Africa",
    "How many {shape}s are in the image? What is the area? What is the perimeter? The side length is {digit}. The angle is",
    "Look at the image carefully and answer the question. Based on the picture, there is a {name}. There is no {other}.",
    "The {name} is in the {place}; the {other} is in the {place}. The image contains the following objects: {name}, {other}.",
    "What time is it? What is the date? January February March April May June July August September October November December",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday. price sales year month day week number total count percent %",
    "Give a detailed description. In the foreground there is a {colour} {name}, {place} a {other}; the rest is empty.",
    "Which {category} is shown? How many {category}s? What is the {category} called? the smallest the leftmost the rightmost",
    "User: assistant system. I can see a {name}. I cannot see it. Not visible. Unknown. The final answer is \\boxed{{{digit}}}.",
)

CHINESE = (
    "请描述这张图片。图片中有一个{name}和一个{other}，背景是{colour}的。", "用一句话描述图片。{place}有一个{colour}的{name}。",
    "这是什么？图中是什么？图片里画的是什么？这是{name}。这是一个{other}。", "请说出图中物体的名称。图中的物体是{name}。",
    "它属于哪一类？它是一种{category}。图中的{category}叫什么？", "{name}是什么颜色的？{name}是{colour}的。背景是什么颜色？",
    "哪个物体是{colour}的？{colour}的是{name}。", "图中有多少个{name}？图中一共有几个物体？共有{number}个{name}。答案是{digit}。",
    "请数一数图中的{other}有几个。有{digit}个。", "{name}在哪里？{name}在图片的{place}。它位于{other}的{place}。",
    "{name}在{other}的左边吗？是的。不是。在右边。", "{name}的{place}是什么？是{other}。哪一个更大？{name}比{other}大。",
    "{name}在{other}的上面还是下面？上面。下面。", "请给出{name}的边界框坐标[x1, y1, x2, y2]。框出{name}的位置。",
    "图中的文字是什么？请识别图片中的文字。文字内容是：请读出这一行字。", "图片上写着什么？写的是：{name}。",
    "哪个{shape}是{colour}的？{colour}的{shape}比{shape}大吗？", "根据{chart}，{name}的数值是多少？数值是{digit}.{digit}。",
    "{chart}的标题是什么？哪一类的数值最高？最低的是哪一项？", "总数是多少？相差多少？平均值是多少？{name}比{other}多{digit}。",
    "在表格中，第{number}行第{number}列是什么？哪一行的数值最大？哪一列最小？", "计算：{digit}+{digit}={digit}。等于多少？",
    "请计算{digit}乘以{digit}。减去{digit}等于{digit}。加上除以结果是{digit}。", "先算{digit}加{digit}，再减。所以答案是{digit}。",
    "请一步一步地思考，然后给出最终答案。首先，其次，因此。", "比较这两张图片。第一张图片和第二张图片有什么不同？",
    "第一张图片中有{name}，第二张图片中有{other}。哪张图片里有{name}？", "两张图片相同吗？相同。不同。两张都有。都没有。",
    "从第一张到第二张有什么变化？增加了{name}。少了{other}。", "视频中发生了什么？{name}从左向右{motion}，然后{motion}。",
    "{name}向哪个方向移动？它朝{place}{motion}。", "{name}出现了几次？在{name}{motion}之前，{other}{motion}。哪个先发生？",
    "请选择正确的选项，只回答字母。A. {name} B. {other} C. {colour} D. {shape}", "请用一个词或短语回答问题。请直接回答。请回答是或否。",
    "这是哪个国家或地区的旗帜？这是{name}的国旗。首都是哪里？在哪个洲？亚洲欧洲非洲美洲大洋洲", "图中有几个{shape}？面积是多少？周长是多少？边长是{digit}。",
    "请仔细观察图片并回答问题。根据图片，有一个{name}，没有{other}。", "{name}在{place}，{other}在{place}。图片中包含以下物体：{name}、{other}。",
    "现在是几点？今天是几月几日星期几？价格销量年份月份数量总计百分比", "请详细描述这幅图。画面{place}有一个{colour}的{name}，旁边是{other}。",
    "最小的是哪一个？最左边的是什么？最右边的是{name}。", "我看到一个{name}。图中没有。看不清楚。不知道。最终答案是\\boxed{{{digit}}}。",
)  # fmt: skip

WORDS_EN = (
    "how many what where which who when why read count name describe compare picture image photo drawing text word letter "
    "answer question yes no the a of and or not there is are it this that in on at to from with than more less most least "
    "smaller larger bigger smallest largest biggest highest lowest higher lower first second third last same different "
    "both neither left right top bottom above below between next before after value title row column total sum "
    "difference average bar line pie chart table axis label colour color background object shape size kind category "
    "animal plant food drink person vehicle building tool symbol flag country capital continent clip video frame moves "
    "move direction clockwise counterclockwise up down says written sign number digit plus minus times equals result "
    "step therefore think final correct option box caption sentence shows see contains added removed changed appears"
).split()
WORDS_ZH = (
    "图片 图中 图像 图里 画面 这张 两张 第一张 第二张 请问 请 描述 回答 问题 答案 什么 多少 几个 哪个 哪里 哪一个 哪张 哪种 为什么 怎么 "
    "是 不是 是的 有 没有 在 的 和 或 与 比 了 吗 呢 这 那 它 一个 一共 共有 总共 个 只 张 种 条 颜色 形状 大小 数量 种类 类别 名称 名字 "
    "物体 东西 位置 方向 背景 文字 标题 内容 数值 数字 字母 单词 句子 一句话 左 右 上 下 左边 右边 上面 下面 左侧 右侧 上方 下方 向左 向右 "
    "向上 向下 从左到右 从右到左 从上到下 从下到上 顺时针 逆时针 柱状图 折线图 饼图 散点图 表格 图表 横轴 纵轴 行 列 第几 最高 最低 最大 最小 "
    "最多 最少 较大 较小 更大 更小 更多 相差 总和 总数 平均 计算 等于 加 减 乘 除 加上 减去 结果 因此 所以 首先 然后 最后 第一 第二 第三 "
    "相同 不同 一样 变化 增加 减少 出现 消失 移动 上升 下降 旋转 视频 片段 帧 国旗 旗帜 国家 地区 首都 动物 植物 食物 人物 工具 符号 建筑 "
    "交通工具 红 橙 黄 绿 蓝 紫 粉 棕 黑 白 灰 红色 橙色 黄色 绿色 蓝色 紫色 粉色 棕色 黑色 白色 灰色 之间 旁边 中间 左上角 右上角 左下角 右下角 "
    "选择 选项 正确 错误 识别 读出 数一数 写着 属于 包含 显示 看到 写 读 数 说 思考 最终 一步一步"
).split()


def words(categories: dict[str, str], repeats: int) -> Iterator[tuple[str, str]]:
    """(language, word) pairs, each alone: Chinese has no spaces, so sentences alone would merge across its words."""
    tables = (COLOURS, PLACES, SHAPES, CHARTS, MOTIONS, categories)
    english = dict.fromkeys([*WORDS_EN, *(word for table in tables for key in table for word in key.split())])
    chinese = dict.fromkeys([*WORDS_ZH, *(value for table in tables for value in table.values())])
    for _ in range(repeats):
        for word in english:
            yield "en", f" {word} {word.capitalize()}"
            yield "en", word
        for word in chinese:
            yield "zh", word


def sentences(
    names: Sequence[tuple[str, str]], categories: dict[str, str], rounds: int, seed: int
) -> Iterator[tuple[str, str]]:
    """(language, sentence) pairs: every template ``rounds`` times in both languages."""
    rng = random.Random(seed)

    def fill(template: str, which: int) -> str:
        def pick(table: dict[str, str]) -> str:
            return rng.choice(list(table.items()))[which]

        return template.format(
            name=rng.choice(names)[which],
            other=rng.choice(names)[which],
            colour=pick(COLOURS),
            number=pick(NUMBERS),
            place=pick(PLACES),
            shape=pick(SHAPES),
            chart=pick(CHARTS),
            motion=pick(MOTIONS),
            category=pick(categories),
            digit=rng.randrange(1, 100),
        )

    for _ in range(rounds):
        for template in ENGLISH:
            yield "en", fill(template, 0)
        for template in CHINESE:
            yield "zh", fill(template, 1)
