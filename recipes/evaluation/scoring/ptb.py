# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Words of captions as pycocoevalcap's PTB tokenizer gives them, without Java.

The same words on what captions are made of, as far as tried; not on every text: that tokenizer (Stanford CoreNLP 3.4.1) has
rules for much that captions do not have.
"""

import re
from functools import lru_cache

# What the official evaluation takes out, after lower-casing. Brackets and signs that stand together, such as "?!", stay.
_REMOVED = frozenset(("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_BRACKETS = (("(", "-lrb-"), (")", "-rrb-"), ("[", "-lsb-"), ("]", "-rsb-"), ("{", "-lcb-"), ("}", "-rcb-"))
_SIGNS = str.maketrans(
    dict.fromkeys("’‘", "'")
    | dict.fromkeys("“”«»‹›", '"')
    | dict.fromkeys("–—", " -- ")
    | {"\u00ad": "", "\u200b": " ", "…": " ... ", "¢": " cents ", "€": "$", "£": "#"}
    | {"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
)
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": '"', "apos": "'", "nbsp": " "}
_ENTITY = re.compile(rf"&({'|'.join(_ENTITIES)});")
_ABBREVIATIONS = """
    adj adm adv al ala apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt cf cie cmdr co
    col colo comdr conn corp cos cpl ct dak dec dept det dr drs ens esq est etc ext feb fla fri ft ga gen gov govs hon inc
    ind insp intl invt elec jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mme mo mon mont mr
    mrs ms mt mtg natl neb nev nov oct okla penn tenn pfc ph plc pres prof profs pte ptes pty pvt rd rep reps rev rt sen sens
    sep sept seq sfc sgt spc sq sr st ste supt supts sys tel thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
""".split()
_CAPITALIZED = "Az La Pa Ark Del Ill Ore Tex Mass Miss Wash".split()  # words of their own in lower case
_WORD = r"[^\W\d_](?:[^\W_])*"
_PART = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_ADDRESS = r"[^\s\"<>|()]*[^\s\"<>|()\[\]{}.,!?;:']"
# The longest match is taken, of equals the first. Group 1 is the token; what follows it must be there.
_RULES = [
    re.compile(rule)
    for rule in (
        r"(</?[A-Za-z][^\s<>]*/?>)",
        rf"(https?://{_ADDRESS})",
        rf"(www\.{_ADDRESS})",
        r"([A-Za-z0-9][\w.+-]*@[A-Za-z0-9][\w.-]*)",
        r"([@#][A-Za-z]\w*)",
        r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",  # dates
        r"([A-Z]+(?:[+&][A-Z]+)+)",  # AT&T
        rf"({_PART}(?:/{_PART}){{1,2}})",  # and/or, 1/2
        r"([A-Za-z](?:\.[A-Za-z])*\.)(?![A-Za-z0-9])",  # initials, a.m.
        r"((?:[Pp]h|PH|[Ee]d|ED)\.[Dd]\.)",
        rf"((?:(?i:{'|'.join(_ABBREVIATIONS)})|(?:{'|'.join(_CAPITALIZED + [word.upper() for word in _CAPITALIZED])}))\.)"
        r"(?![^\W_])",
        rf"({_WORD}\.)[,;:]",
        r"((?i:nos?|figs?|prop|pp)\.)\s*\d",
        r"([A-Za-z](?:\+\+|#))",  # C++
        r"([^\W_][^\W_.,]*(?:[.,]+[^\W_.,]+)*\.?(?:-(?:[dDoOlL]'(?=[A-Za-z0-9]))?(?:[A-Za-z]\.(?:[A-Za-z]\.)+|[^\W_]+))+)",  # two-story
        r"((?i:can))(?i:not)(?![^\W_])",
        r"((?i:go[nt]|wan|lem|gim))(?i:na|ta|me)(?![^\W_])",
        r"((?i:na|ta|me))(?![^\W_])",
        r"((?i:more))'(?i:n)(?![^\W_])",
        r"('(?i:t))(?i:is|was)(?![^\W_])",
        r"((?i:y)')[A-Za-z]",
        r"('(?i:n)')",
        r"('(?i:n|em|cause|till?))(?![^\W_])",
        r"((?i:c'mon|ma'am|ne'er|nor'easter|o'er|e'er|ol'))(?![^\W_])",
        r"([dDoOlL]'[A-Za-z0-9]+)",  # o'clock
        r"('[0-9]0s?)(?![^\W_])",
        r"('\d\d)$",
        rf"({_WORD}?)(?i:n['`]t)(?![A-Za-z])",
        r"((?i:n['`]t))(?![A-Za-z])",
        rf"({_WORD}|\d+)'(?i:s|m|d|ll|re|ve)(?![A-Za-z])",
        r"('(?i:s|m|d|ll|re|ve))(?![A-Za-z])",
        rf"({_WORD}(?:[.!?]{_WORD})*)",
        r"([A-Za-z0-9]+(?:_+[A-Za-z0-9]+)*)",
        r"([-+]?(?:\d+(?:[.:,]\d+)*|\.\d+(?:[.:,]\d+)*))",
        r"([<>]?[:;=][-o*']?[()DPdpO@|\[\]])(?![A-Za-z0-9])",  # smileys
        r"(\.\.\.+|[?!]+|--+|_+|\*+|[A-Z]*\$|\S)",
    )
]
# A letter before such a word ends its sentence, and is no initial.
_LETTER_AT_END = re.compile(
    r"(?<![\w.])([A-Za-z])\.(?=\s+(?:A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|"
    r"Last|Many|More|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|"
    r"When|While|Yet|You)\s)"
)
# A number belongs to the abbreviation before it.
_CHUNK = re.compile(r"(?i:nos?|figs?|prop|pp)\.\s+\d\S*|\S+")


def ptb_tokenize(text: str) -> list[str]:
    """Return the words of a text, lower case, without punctuation."""
    plain = _ENTITY.sub(lambda match: _ENTITIES[match[1]], text).translate(_SIGNS)
    plain = _LETTER_AT_END.sub(r"\1 ", plain)
    return [word for chunk in _CHUNK.findall(plain) for word in _words(chunk)]


@lru_cache(maxsize=100_000)
def _words(chunk: str) -> tuple[str, ...]:
    words, at = [], 0
    while at < len(chunk):
        if chunk[at].isspace():
            at += 1
            continue
        found = max((match for rule in _RULES if (match := rule.match(chunk, at))), key=lambda match: match.end())
        token = found[1]
        at += len(token)
        if token > "\uffff" or not token.strip("."):  # what it does not know, and dots
            continue
        token = "--" if token.startswith("---") else token.lower()
        for sign, name in _BRACKETS:
            token = token.replace(sign, name)
        if token not in _REMOVED:
            words.append(token)
    return tuple(words)
