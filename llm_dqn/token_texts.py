"""What each token of a completion adds to its text, for any tokenizer: byte-level BPE, SentencePiece, emoji and all."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what decoders write for bytes that are not (yet) a character


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Texts that joined are `decode(ids, skip_special_tokens=True)`, one a token.

    A character made of several tokens belongs to the last of them, the earlier ones are "". Special tokens, which the
    decoded text leaves out, keep their name ("</s>").
    """
    return texts_of(tokenizer).split(list(ids))


@lru_cache(maxsize=4)
def texts_of(tokenizer: PreTrainedTokenizerBase) -> "TokenTexts":
    """The texts of a tokenizer's tokens; kept, since each is found out once."""
    return TokenTexts(tokenizer)


class TokenTexts(dict[int, str]):
    """Token id -> its text in the middle of a sentence, filled as ids are asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        added = {token for token, facts in tokenizer.added_tokens_decoder.items() if facts.special}
        self.special = frozenset({*tokenizer.all_special_ids, *added})
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"]

    def __missing__(self, token: int) -> str:
        if token in self.special:
            text = str(self.tokenizer.convert_ids_to_tokens(token))
        else:
            # Alone, or at the start, some tokens lose the space that they begin with.
            before, both = self._decode(self._before), self._decode([*self._before, token])
            text = both.removeprefix(before) if both.startswith(before) else self._decode([token])
        self[token] = text
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def split(self, ids: list[int]) -> list[str]:
        """`token_texts` of these ids."""
        texts, whole = [self[token] for token in ids], self._decode(ids)
        if self._joined(ids, texts) == whole and _BROKEN not in whole:
            return texts
        texts = self._mended(ids, texts)
        if (joined := self._joined(ids, texts)).endswith(whole):
            return self._without_start(ids, texts, len(joined) - len(whole))
        return self._by_prefixes(ids, whole)

    def _joined(self, ids: list[int], texts: list[str]) -> str:
        return "".join([text for token, text in zip(ids, texts, strict=True) if token not in self.special])

    def _mended(self, ids: list[int], texts: list[str]) -> list[str]:
        """Runs of tokens that are parts of characters, read together."""
        mended: list[str] = []
        for broken, run in groupby(range(len(ids)), key=lambda place: _BROKEN in texts[place]):
            places = list(run)
            part = [ids[place] for place in places]
            mended += self._by_prefixes(part, self._decode(part)) if broken else [texts[place] for place in places]
        return mended

    def _without_start(self, ids: list[int], texts: list[str], surplus: int) -> list[str]:
        """Texts less their first `surplus` characters: decoders of whole texts drop the space at the start."""
        kept = list(texts)
        for place, token in enumerate(ids):
            if surplus and token not in self.special:
                kept[place], surplus = texts[place][surplus:], max(0, surplus - len(texts[place]))
        return kept

    def _by_prefixes(self, ids: list[int], whole: str) -> list[str]:
        """Cuts the whole text where the texts of ever longer prefixes stop agreeing with it: always right, but slow."""
        texts, done = [], 0
        for place, token in enumerate(ids):
            end = len(whole) if place + 1 == len(ids) else _agreement(self._decode(ids[: place + 1]), whole)
            end = max(done, end)
            texts.append(self[token] if token in self.special else whole[done:end])
            done = end if token not in self.special else done
        return texts


def _agreement(text: str, other: str) -> int:
    """How many characters the two begin with in common."""
    if other.startswith(text):
        return len(text)
    return next((place for place, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), len(other))
