"""Chinese greetings for the toy recipe that teaches a model to write 你好世界; they never hold that string."""

import random


def words(text: str) -> list[str]:
    """The words of a list written in one string."""
    return text.split()


GOAL = "你好世界"
# The characters of the goal are common, so that chance finds some of them and seldom three.
GREETINGS = words(
    "你好 " * 6 + "您好 早安 晚安 午安 再见 你早 您早 谢谢 欢迎 大家好 早上好 晚上好 下午好 老师好 你们好 好久不见"
)
PEOPLE = words("世界 " * 6 + "朋友 同学 老师 大家 妈妈 爸爸 先生 小朋友 中国 北京 上海 各位 家人 亲友")
WISHES = words(
    "新年快乐 生日快乐 节日快乐 春节快乐 一路平安 心想事成 万事如意 身体健康 天天开心 花好月圆 年年有余 平安喜乐 "
    "早日康复 学习进步 工作顺利 岁岁平安 吉祥如意 恭喜发财 前程似锦"
)
TALK = words(
    "你好吗 你是谁 你吃了吗 你来了 你在哪里 你真好 天气很好 很高兴见你 我很好 请进 请坐 请喝茶 明天见 下次见 "
    "看世界 新世界 大世界 小世界 我爱世界 走进世界 美好世界 世界真大 世界和平 世界很美 我爱中国 我们回家 山水如画"
)
VERBS = words(
    "问候 写 说 请写 请说 打招呼 写一句 说一句 请问候 一句话 开始 回答 请回答 见面 早上 晚上 春天 新年 写信 短信"
)
MARKS = "：，。！？"


def write_greeting(rng: random.Random) -> str:
    """Two to six characters of greeting, wish or small talk."""
    while True:
        kind = rng.choices(["greeting", "addressed", "wish", "talk", "mixed"], [0.18, 0.4, 0.14, 0.2, 0.08])[0]
        if kind == "greeting":
            text = rng.choice(GREETINGS)
        elif kind == "addressed":
            pair = [rng.choice(GREETINGS), rng.choice(PEOPLE)]
            text = "".join(pair if rng.random() < 0.75 else reversed(pair))
        elif kind == "wish":
            text = rng.choice(WISHES)
        elif kind == "talk":
            text = rng.choice(TALK)
        else:
            text = "".join(rng.choices("".join(GREETINGS + PEOPLE + TALK), k=rng.randint(2, 5)))
        if 2 <= len(text) <= 6 and GOAL not in text:
            return text


def prompts() -> list[str]:
    """The prompts, each ending with a colon."""
    return [f"{verb}：" for verb in VERBS] + [f"{verb}，{other}：" for verb in VERBS[:4] for other in VERBS[14:18]]


def write_line(rng: random.Random) -> str:
    """A prompt and a greeting, as the model sees them in training."""
    return rng.choice(prompts()) + write_greeting(rng)


def characters() -> str:
    """Every character that may occur."""
    return "".join(sorted(set("".join([GOAL, MARKS, *GREETINGS, *PEOPLE, *WISHES, *TALK, *VERBS]))))


def points(completion: str) -> int:
    """How many of the four characters stand in the right place."""
    return sum(written == wanted for written, wanted in zip(completion, GOAL, strict=False))
