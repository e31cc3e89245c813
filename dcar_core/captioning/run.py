"""A folder per category becomes annotations in FDRD's form, as FDRD was made (the paper's Figure 3).

    picture --question--> draft --filters--> --judge--> caption; or the draft with its reason, and the question again

- captions.json gets the accepted captions, captions.rejected.jsonl every other draft with its reason, and
  captions.journal.jsonl every answer: killed, the same run goes on with what is not answered yet.
- A picture whose drafts are all rejected is given up and not asked for again; one whose requests fail is, next time.
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from dcar_core.captioning.endpoint import Completion, Endpoint
from dcar_core.captioning.filters import DUPLICATE, JUDGED, REFUSED, DraftFilter, Rejection
from dcar_core.captioning.images import data_uri, folder_category, list_images
from dcar_core.captioning.journal import CaptionedImage, CaptionJournal
from dcar_core.captioning.options import CaptioningResult, CaptionOptions, TokenUsage, VisionModel
from dcar_core.captioning.questions import (
    Judgement,
    draft_messages,
    judge_messages,
    question,
    read_verdict,
    tidy_draft,
    word_limit,
)
from dcar_core.util.errors import CaptionError, DataError, DcarError, EndpointError, ImageError, LockedError
from dcar_core.util.files import atomic_writer, write_json

CountTokens = Callable[[Sequence[str]], list[int]]


def caption_images(
    images: Path,
    out: Path,
    drafter: VisionModel,
    judge: VisionModel | None,
    options: CaptionOptions,
    count_tokens: CountTokens,
    *,
    restart: bool = False,
    progress: bool = True,
) -> CaptioningResult:
    """Have captions written for every picture of a folder per category, and write them to `out`.

    Args:
        judge: None accepts what the filters let through.
        count_tokens: CLIP's tokens of texts, SOS and EOT included.
        restart: forget what an earlier run to `out` was answered.

    Raises:
        DataError: no pictures in folders, or an `out` that is not this command's.
        CaptionError: nothing can be asked (key, model, address), or `out` belongs to a run with other settings.
        LockedError: another run writes to `out`.
    """
    journal_file = _beside(out, "journal")
    if out.suffix != ".json":
        raise DataError(f"{out}: the annotations are JSON; give --out a name that ends in .json")
    if out.exists() and not journal_file.exists():
        raise DataError(f"{out} is there already and not from this command; give another --out")
    names, loose = list_images(images)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        with lock.acquire(timeout=0):
            if restart:
                journal_file.unlink(missing_ok=True)
            journal = CaptionJournal(journal_file, options.settings(drafter, judge))
            run = _Run(images, out, drafter, judge, options, count_tokens, journal)
            run.outcome.loose = loose
            try:
                asyncio.run(run.all(names, progress))
            except BaseExceptionGroup as group:
                error = _first(group)
                raise (error if isinstance(error, DcarError) else group) from None
            finally:
                journal.close()
                run.write(names)
    except Timeout:
        raise LockedError(f"another run is writing to {out}") from None
    return run.outcome


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.stem}.{what}.jsonl")


def _verdict(answer: Completion) -> Judgement | None:
    return read_verdict(answer.text) if answer.finish != REFUSED else None


class _Run:
    def __init__(
        self,
        images: Path,
        out: Path,
        drafter: VisionModel,
        judge: VisionModel | None,
        options: CaptionOptions,
        count_tokens: CountTokens,
        journal: CaptionJournal,
    ) -> None:
        self.images, self.out, self.options, self.journal = images, out, options, journal
        self.models = {"draft": drafter} | ({"judge": judge} if judge is not None else {})
        self.endpoints: dict[str, Endpoint] = {}
        self.filters = DraftFilter(options.context, word_limit(options.context), count_tokens)
        self.outcome = CaptioningResult(out)
        self._captions = journal.latest()
        self._of_bytes = {
            (sha, folder_category(image)[0]): said for (image, sha), said in journal.finished.items() if said
        }
        self._in_a_row = 0

    async def all(self, names: Sequence[str], progress: bool) -> None:
        """Every picture, `concurrency` of them at a time.

        Those that are finished come first: theirs are the captions that no other picture may have. Those of pictures
        that are gone may be had again.
        """
        self.endpoints = {asked: Endpoint(model, self.options) for asked, model in self.models.items()}
        with tqdm(total=len(names), unit="picture", desc="captions", disable=not progress) as bar:
            try:
                await self._each([name for name in names if name in self._captions], self._recall, bar)
                await self._each([name for name in names if name not in self._captions], self._picture, bar)
            finally:
                for endpoint in self.endpoints.values():
                    await endpoint.close()

    async def _each(self, names: Sequence[str], do: Callable[[str], Awaitable[bool]], bar: Any) -> None:
        """do: says whether the picture is done with."""
        left = iter(names)

        async def worker() -> None:
            for name in left:
                bar.update(await do(name))
                bar.set_postfix_str(self.spent(), refresh=False)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.options.concurrency):
                tasks.create_task(worker())

    async def _recall(self, name: str) -> bool:
        """Take what an earlier run made of this picture; not if it cannot be read, or another one has its name now."""
        try:
            picture, _ = await self._read(name)
            said = self.journal.finished[name, picture.sha]
        except (OSError, KeyError):
            del self._captions[name]
            return False
        if said:
            self.filters.accept(said, name)
        self._done(picture)
        return True

    async def _picture(self, name: str) -> bool:
        try:
            name.encode()  # neither the journal nor the annotations could hold it
            picture, content = await self._read(name)
            moved = self._moved(picture)
            uri = "" if moved else await asyncio.to_thread(data_uri, content, self.options.side)
        except (ImageError, OSError) as error:
            self.outcome.broken[name] = str(error)
            return True
        except UnicodeEncodeError:
            self.outcome.broken[name] = "its name is not UTF-8; rename the file"
            return True
        try:
            if moved:
                self._accept(picture, moved)
            else:
                await self._converse(picture, uri)
        except EndpointError as error:
            self.outcome.failed[name] = str(error)
            self._in_a_row += 1
            if self._in_a_row >= self.options.give_up_after:
                raise CaptionError(
                    f"{self._in_a_row} pictures in a row failed; the last, {name}: {error}. What was answered is kept: "
                    f"the same command goes on"
                ) from error
            return True
        self._in_a_row = 0
        self._done(picture)
        return True

    async def _read(self, name: str) -> tuple[CaptionedImage, bytes]:
        content = await asyncio.to_thread((self.images / name).read_bytes)
        return CaptionedImage(name, folder_category(name)[0], hashlib.sha256(content).hexdigest()[:32]), content

    def _moved(self, picture: CaptionedImage) -> str | None:
        """The caption that this picture had under another name in a folder of the same category, if that is gone."""
        said = self._of_bytes.get((picture.sha, picture.category))
        return said if said and self.filters.owner(said) is None else None

    def _accept(self, picture: CaptionedImage, said: str) -> None:
        self.filters.accept(said, picture.image)
        self.journal.finish(picture, said)

    def _done(self, picture: CaptionedImage) -> None:
        said = self._captions[picture.image] = self.journal.finished[picture.image, picture.sha]
        if said:
            self.outcome.accepted += 1
        else:
            self.outcome.given_up.append(picture.image)

    async def _converse(self, picture: CaptionedImage, uri: str) -> None:
        """Drafts until one is accepted, or the rounds are over."""
        options, category = self.options, picture.category.replace("_", " ")
        asked = question(
            options.templates,
            image=picture.image, category=category, dataset=options.dataset, context=options.context,
        )  # fmt: skip
        before: tuple[str, str] | None = None
        for turn in range(options.rounds):
            answer = await self._ask("draft", picture, turn, draft_messages(asked, uri, before))
            draft = tidy_draft(answer.text)
            why = self.filters.rejected(draft, image=picture.image, category=category, finish=answer.finish)
            if why is None and "judge" in self.models:
                why = await self._judged(picture, turn, draft, uri, category)
            if why is None:
                self._accept(picture, draft)
                return
            self.journal.rejected(picture, turn, draft, why)
            before = (draft or "(nothing)", why.feedback)
        self.journal.finish(picture, "")

    async def _judged(
        self, picture: CaptionedImage, turn: int, draft: str, uri: str, category: str
    ) -> Rejection | None:
        messages = judge_messages(draft, uri, category=category, dataset=self.options.dataset)
        answer = await self._ask("judge", picture, turn, messages, usable=lambda answer: _verdict(answer) is not None)
        verdict = _verdict(answer)
        assert verdict is not None  # `usable` saw to it
        if not verdict.accept:
            return Rejection(JUDGED, verdict.feedback or "it does not fit the picture.")
        if self.filters.owner(draft) not in {None, picture.image}:  # accepted while the judge was thinking
            return Rejection(DUPLICATE, "another picture has the very same caption; say what sets this one apart.")
        return None

    async def _ask(
        self,
        asked: str,
        picture: CaptionedImage,
        turn: int,
        messages: list[dict[str, object]],
        usable: Callable[[Completion], bool] = lambda _: True,
    ) -> Completion:
        before = self.journal.answer(picture, asked, turn)
        if before is not None and usable(before):
            return before
        endpoint = self.endpoints[asked]
        try:
            answer = await endpoint.ask(messages, usable)
        except EndpointError:
            self.journal.wasted(asked, endpoint.take_wasted())
            raise
        self.journal.answered(picture, asked, turn, answer)
        return answer

    def spent(self) -> str:
        """Accepted, rejected, tokens and cost so far, earlier runs included."""
        usage = self.journal.usage.values()
        tokens = sum(u.tokens_in + u.tokens_out for u in usage)
        cost = self._cost()
        rejected = self.journal.rejected_drafts
        return f"{self.outcome.accepted:,} accepted, {rejected:,} drafts rejected, {tokens:,} tokens" + (
            f", cost {cost:.4f}" if cost is not None else ""
        )

    def _cost(self) -> float | None:
        if all(model.price is None for model in self.models.values()):
            return None
        return sum(
            self.journal.usage.get(asked, TokenUsage()).cost(model.price) for asked, model in self.models.items()
        )

    def write(self, names: Sequence[str]) -> None:
        """The annotations, and the rejected drafts, as far as the run has come.

        Raises:
            CaptionError: they cannot be written.
        """
        entries = {}
        for name in names:
            if self._captions.get(name):
                category, meta = folder_category(name)
                entries[name] = {
                    "file_name": name,
                    "file_path": name,
                    "class_name": category,
                    **({"meta_category": meta} if meta else {}),
                    "positive": self._captions[name],
                    "negative": [],
                }
        rejections = list(self.journal.rejections())
        try:
            write_json(self.out, entries)
            with atomic_writer(_beside(self.out, "rejected")) as file:
                file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in rejections)
        except OSError as error:
            raise CaptionError(
                f"{self.out} cannot be written: {error.strerror}; what was answered is kept: the same command goes on"
            ) from error
        self.outcome.rejected = Counter(line["reason"] for line in rejections)
        self.outcome.given_up.sort()
        self.outcome.usage, self.outcome.cost = self.journal.usage, self._cost()
