"""Captioning run: images in one folder per category become annotations in FDRD's format (the paper's Figure 3).

    image --question--> draft --filters, judge--> caption; a rejected draft is requested again with feedback

- captions.json holds the accepted captions, captions.rejected.jsonl the rejected drafts with reasons, and
  captions.journal.jsonl every response, so that a killed run resumes.
- An image without an accepted draft is given up for good. An image whose requests failed is retried by the next run.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dcar_core.captioning import questions
from dcar_core.captioning.endpoint import Completion, Endpoint, Usable
from dcar_core.captioning.journal import CaptionedImage, CaptionJournal
from dcar_core.captioning.options import CaptioningResult, CaptionOptions, VisionModel
from dcar_core.captioning.questions import REFUSED, Judgement, Rejection
from dcar_core.data import SPLITS
from dcar_core.data.clean import fold_text
from dcar_core.images import has_image_suffix
from dcar_core.images.decoding import jpeg_data_uri
from dcar_core.negatives.words import fold_name
from dcar_core.util.console import progress_bar
from dcar_core.util.errors import CaptionError, DataError, EndpointError, ImageError
from dcar_core.util.files import write_json, write_json_lines
from dcar_core.util.processes import hold_lock


def caption_images(
    images: Path,
    out: Path,
    drafter: VisionModel,
    judge: VisionModel | None,
    options: CaptionOptions,
    *,
    restart: bool = False,
) -> CaptioningResult:
    """Caption every image of a directory with one folder per category, and write the annotations to `out`.

    Args:
        judge: None accepts every draft that passes the filters.
        restart: discard the journal of an earlier run to `out`.

    Raises:
        DataError: no images in folders, or `out` exists and was not written by this command.
        CaptionError: the key, model or address is wrong, or `out` belongs to a run with other settings.
        LockedError: another run writes to `out`.
    """
    journal_file = _beside(out, "journal")
    if out.suffix != ".json":
        raise DataError(f"{out}: the annotations are JSON; give --out a name that ends in .json")
    if out.exists() and not journal_file.exists():
        raise DataError(f"{out} exists and was not written by this command; give another --out")
    names, loose, linked = _list_images(images)
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(out.with_name(f".{out.name}.lock"), f"another run is writing to {out}"):
        if restart:
            journal_file.unlink(missing_ok=True)
        journal = CaptionJournal(journal_file, options.settings(drafter, judge))
        models = {"draft": drafter} | ({"judge": judge} if judge is not None else {})
        run = _Run(images, models, options, journal, CaptioningResult(out, loose=loose, linked=linked))
        try:
            asyncio.run(run.process(names))
        except ExceptionGroup as group:  # of the tasks, the first of which failed and ended the others
            raise group.exceptions[0] from None
        finally:
            journal.close()
            run.write(names)
    return run.outcome


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.stem}.{what}.jsonl")


def _list_images(images: Path) -> tuple[list[str], list[str], list[str]]:
    """List the images in category folders, those outside of them, and links to folders; `_` is not a category."""
    if not images.is_dir():
        raise DataError(f"{images} is not a directory; --images takes one with a folder for each category")
    below = [p for p in images.rglob("*") if not any(part.startswith(".") for part in p.relative_to(images).parts)]
    shown = sorted(p.relative_to(images).as_posix() for p in below if has_image_suffix(p.name) and p.is_file())
    linked = sorted(p.relative_to(images).as_posix() for p in below if p.is_symlink() and p.is_dir())
    inside = [name for name in shown if "/" in name and fold_name(folder_category(name)[0])]
    if not inside:
        raise DataError(f"{images} has no images in folders; use one folder per category")
    return inside, sorted(set(shown) - set(inside)), linked


def folder_category(name: str) -> tuple[str, str]:
    """Return the folder of an image (its category) and the folder above (its meta-category, or "")."""
    folders = name.split("/")[:-1]
    meta = folders[-2] if len(folders) > 1 and folders[-2] not in SPLITS else ""
    return folders[-1], meta


def _verdict(answer: Completion) -> Judgement | None:
    return questions.read_verdict(answer.text) if answer.finish != REFUSED else None


class _Run:
    def __init__(
        self,
        images: Path,
        models: Mapping[str, VisionModel],
        options: CaptionOptions,
        journal: CaptionJournal,
        outcome: CaptioningResult,
    ) -> None:
        self.images, self.models, self.options, self.journal = images, models, options, journal
        self.outcome = outcome
        self.endpoints: dict[str, Endpoint] = {}
        self._owners: dict[str, str] = {}  # folded caption -> its image
        self._captions: dict[str, str] = {}
        self._of_bytes = {
            (sha, folder_category(image)[0]): caption for (image, sha), caption in journal.finished.items() if caption
        }
        self._failed_in_a_row = 0

    async def process(self, names: Sequence[str]) -> None:
        """Process every image, `concurrency` at a time.

        Finished images come first, so that their captions are reserved. The captions of deleted images are free again.
        """
        known = {name for name, _ in self.journal.finished}
        left = [name for name in names if name not in known or not self._reuse_caption(name)]
        waiting = iter(left)
        self.endpoints = {role: Endpoint(model, self.options) for role, model in self.models.items()}

        async def worker() -> None:
            for name in waiting:
                await self._image(name)
                bar.update()
                bar.set_postfix_str(self.totals(), refresh=False)

        done = len(names) - len(left)
        with progress_bar(len(names), "captions", "image", initial=done) as bar:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(self.options.concurrency):
                        tasks.create_task(worker())
            finally:
                for endpoint in self.endpoints.values():
                    await endpoint.close()

    def _reuse_caption(self, name: str) -> bool:
        """Reuse the caption of an earlier run. Return False for an image that is unreadable or has changed."""
        try:
            image, _ = self._read(name)
            caption = self.journal.finished[name, image.sha]
        except (OSError, KeyError):
            return False
        if caption:
            self._owners[fold_text(caption)] = name
        self._count(image)
        return True

    async def _image(self, name: str) -> None:
        try:
            name.encode()  # the journal and the annotations are UTF-8
            image, content = await asyncio.to_thread(self._read, name)
            caption = self._of_bytes.get((image.sha, image.category), "")  # of the image's former name
            if fold_text(caption) in self._owners:
                caption = ""
            uri = "" if caption else await asyncio.to_thread(jpeg_data_uri, content, self.options.side)
        except (ImageError, OSError, UnicodeEncodeError) as error:
            is_name = isinstance(error, UnicodeEncodeError)
            self.outcome.broken[name] = "its name is not UTF-8; rename the file" if is_name else str(error)
            return
        if caption:
            self._accept(image, caption)
        else:
            try:
                await self._request_drafts(image, uri)
            except EndpointError as error:
                self.outcome.failed[name] = str(error)
                self._failed_in_a_row += 1
                if self._failed_in_a_row >= self.options.give_up_after:
                    raise CaptionError(
                        f"{self._failed_in_a_row} consecutive images failed; the last, {name}: {error}. Responses are "
                        f"kept; run the same command to resume"
                    ) from error
                return
        self._failed_in_a_row = 0
        self._count(image)

    def _read(self, name: str) -> tuple[CaptionedImage, bytes]:
        content = (self.images / name).read_bytes()
        return CaptionedImage(name, folder_category(name)[0], hashlib.sha256(content).hexdigest()[:32]), content

    def _accept(self, image: CaptionedImage, caption: str) -> None:
        self._owners[fold_text(caption)] = image.name
        self.journal.finish(image, caption)

    def _count(self, image: CaptionedImage) -> None:
        caption = self._captions[image.name] = self.journal.finished[image.name, image.sha]
        if caption:
            self.outcome.accepted += 1
        else:
            self.outcome.given_up.append(image.name)

    async def _request_drafts(self, image: CaptionedImage, uri: str) -> None:
        """Request drafts until one is accepted or the rounds are used up."""
        options, category = self.options, image.category.replace("_", " ")
        text = questions.question(
            options.templates,
            image=image.name, category=category, dataset=options.dataset, context=options.context,
        )  # fmt: skip
        before: tuple[str, str] | None = None
        for turn in range(options.rounds):
            answer = await self._ask("draft", image, turn, questions.messages_for(text, uri, before))
            draft = questions.tidy_draft(answer.text)
            why = questions.rejection(draft, category=category, finish=answer.finish, context=options.context)
            why = why or self._duplicate(draft, image)
            if why is None and "judge" in self.models:  # meanwhile another image may have got the caption
                why = await self._judged(image, turn, draft, uri, category) or self._duplicate(draft, image)
            if why is None:
                self._accept(image, draft)
                return
            self.journal.reject(image, turn, draft, why)
            before = (draft or "(nothing)", why.feedback)
        self.journal.finish(image, "")

    async def _judged(self, image: CaptionedImage, turn: int, draft: str, uri: str, category: str) -> Rejection | None:
        text = questions.JUDGE_TEMPLATE.format(draft=draft, category=category, dataset=self.options.dataset)
        messages = questions.messages_for(text, uri)
        answer = await self._ask("judge", image, turn, messages, usable=lambda answer: _verdict(answer) is not None)
        verdict = _verdict(answer)
        assert verdict is not None  # guaranteed by `usable`
        if verdict.accept:
            return None
        return Rejection("rejected by the judge", verdict.feedback or "it does not match the image.")

    def _duplicate(self, draft: str, image: CaptionedImage) -> Rejection | None:
        if self._owners.get(fold_text(draft), image.name) == image.name:
            return None
        reason = "another image has the same caption"
        return Rejection(reason, f"{reason}; describe what is specific to this one.")

    async def _ask(
        self,
        role: str,
        image: CaptionedImage,
        turn: int,
        messages: list[dict[str, object]],
        usable: Usable = lambda _: True,
    ) -> Completion:
        before = self.journal.answer(image, role, turn)
        if before is not None and usable(before):
            return before
        usage, answer = Counter[str](), None
        try:
            answer = await self.endpoints[role].ask(messages, usage, usable)
            return answer
        finally:
            self.journal.record(image, role, turn, answer, usage)

    def totals(self) -> str:
        """Format accepted and rejected drafts, tokens and cost, earlier runs included."""
        tokens = sum(usage["tokens_in"] + usage["tokens_out"] for usage in self.journal.usage.values())
        cost, rejected = self._cost(), len(self.journal.rejected)
        cost_text = f", cost {cost:.4f}" if cost is not None else ""
        return f"{self.outcome.accepted:,} accepted, {rejected:,} drafts rejected, {tokens:,} tokens{cost_text}"

    def _cost(self) -> float | None:
        if all(model.price is None for model in self.models.values()):
            return None
        prices = {role: model.price or (0.0, 0.0) for role, model in self.models.items()}
        used = self.journal.usage.items()
        return sum(prices[r][0] * usage["tokens_in"] + prices[r][1] * usage["tokens_out"] for r, usage in used) / 1e6

    def write(self, names: Sequence[str]) -> None:
        """Write the annotations and the rejected drafts so far. Raise CaptionError if a file cannot be written."""
        out, entries = self.outcome.out, {}
        for name in names:
            if self._captions.get(name):
                category, meta = folder_category(name)
                entry = {"file_name": name, "file_path": name, "class_name": category}
                group = {"meta_category": meta} if meta else {}
                entries[name] = {**entry, **group, "positive": self._captions[name], "negative": []}
        rejections = list(self.journal.rejections())
        try:
            write_json(out, entries)
            write_json_lines(_beside(out, "rejected"), rejections)
        except OSError as error:
            hint = "responses are kept; run the same command to resume"
            raise CaptionError(f"{out} cannot be written: {error.strerror}; {hint}") from error
        self.outcome.rejected = Counter(line["reason"] for line in rejections)
        self.outcome.given_up.sort()
        self.outcome.usage, self.outcome.cost = self.journal.usage, self._cost()
