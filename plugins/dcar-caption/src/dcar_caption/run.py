"""Captioning run: images in one folder per category become annotations in FDRD's format
(the paper's Figure 3).

    image --question--> draft --filters, judge--> caption; a rejected draft is requested
    again with feedback

In the journal an image is its category and the hash of its bytes: a moved image keeps
its caption, a replaced one is captioned anew. The caption of an image whose drafts were
all rejected is "".
"""

import asyncio
import base64
import hashlib
import io
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from dcar_caption import questions
from dcar_caption.endpoint import (
    KEYS,
    CaptionError,
    Completion,
    EndpointError,
    open_endpoints,
)
from dcar_caption.journal import Journal
from dcar_caption.options import CaptionOptions
from dcar_core.data import SPLITS
from dcar_core.data.samples import fold_text
from dcar_core.images import has_image_suffix
from dcar_core.images.decoding import open_image
from dcar_core.util.console import progress_bar
from dcar_core.util.errors import DataError, ImageError, shorten
from dcar_core.util.files import write_json
from dcar_core.util.processes import hold_lock

MAX_FAILED = 8  # consecutive images whose requests fail before the run ends


class CaptioningRun:
    """A run and its outcome. rejected: drafts by reason. failed, left_out: reasons by
    image.
    """

    def __init__(self, options: CaptionOptions) -> None:
        self.accepted = 0
        self.rejected = Counter[str]()
        self.usage = Counter[str]()
        self.failed = dict[str, str]()
        self.left_out = dict[str, str]()
        self.options = options
        self.endpoints = open_endpoints(options, self.usage)
        self._keys = self._find_images(options.images)
        self._templates = questions.load_templates(options.templates)
        self._dataset = options.dataset or options.images.resolve().name.replace(
            "_", " "
        )
        self._failed_in_a_row = 0
        self.settings = {
            "models": [endpoint.model for endpoint in self.endpoints.values()],
            "dataset": self._dataset,
            "templates": self._templates,
            "context": options.context,
            "rounds": options.rounds,
            "side": options.side,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
        }

    def _find_images(self, folder: Path) -> dict[str, str]:
        """Return the keys of images in category folders, by name; copies in a category
        are numbered.
        """
        paths = {
            path.relative_to(folder).as_posix(): path for path in folder.rglob("*")
        }
        keys = dict[str, str]()
        copies = Counter[str]()
        for name, path in sorted(paths.items()):
            if name.startswith(".") or "/." in name:
                continue
            if path.is_symlink() and path.is_dir():
                self.left_out[name] = "a link to a folder"
            elif (
                has_image_suffix(name)
                and path.is_file()
                and not _folders(name)[0].strip("_ ")
            ):
                self.left_out[name] = "outside of category folders"
            elif has_image_suffix(name) and path.is_file():
                try:
                    name.encode()  # the annotations are UTF-8
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    key = f"{_folders(name)[0]}/{digest}"
                    copies[key] += 1
                    keys[name] = f"{key}/{copies[key]}"
                except (OSError, UnicodeEncodeError) as error:
                    self.left_out[name] = str(error)
        if not keys:
            raise DataError(
                f"{folder} has no images in folders; --images takes one with a folder"
                " for each category"
            )
        return keys

    async def process(self, journal: Journal) -> None:
        """Caption every image, `concurrency` at a time; the captions of finished ones
        are reserved first.
        """
        self._journal = journal
        self.usage.update(journal.get("", "usage") or {})
        captions = {
            name: journal.get(key, "caption") for name, key in self._keys.items()
        }
        self._owners = {
            fold_text(caption): self._keys[name]
            for name, caption in captions.items()
            if caption
        }
        waiting = iter(
            left := [name for name, caption in captions.items() if caption is None]
        )

        async def work() -> None:
            for name in waiting:
                await self._process(name, self._keys[name])
                journal.put(self.usage, "", "usage")
                bar.update()

        with progress_bar(
            len(captions),
            "captions",
            "image",
            initial=len(captions) - len(left),
        ) as bar:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(self.options.concurrency):
                        tasks.create_task(work())
            finally:
                for endpoint in self.endpoints.values():
                    await endpoint.client.close()

    async def _process(self, name: str, key: str) -> None:
        """Caption an image. Raise CaptionError if too many have failed in a row."""
        try:
            uri = await asyncio.to_thread(
                _data_uri,
                self.options.images / name,
                self.options.side,
            )
            self._journal.put(
                await self._caption(_folders(name)[0].replace("_", " "), key, uri),
                key,
                "caption",
            )
            self._failed_in_a_row = 0
        except ImageError as error:
            self.left_out[name] = str(error)
        except EndpointError as error:
            self.failed[name] = str(error)
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= MAX_FAILED:
                hint = (
                    f"check the URL, the model and the key ({KEYS}), and run the same"
                    " command to resume"
                )
                raise CaptionError(
                    f"{MAX_FAILED} consecutive images failed; {name}: {error}; {hint}"
                ) from error

    async def _caption(self, category: str, key: str, uri: str) -> str:
        """Request drafts until one is accepted; return "" if the rounds are used up."""
        context = self.options.context
        words = max(8, int(0.6 * context))  # nearly always fits
        shown = {"category": category, "dataset": self._dataset, "words": words}
        text = questions.question(self._templates, key, **shown)
        before = None
        for turn in range(self.options.rounds):
            answer = await self._ask(
                "draft",
                key,
                turn,
                questions.messages_for(text, uri, before),
            )
            draft = questions.tidy_draft(answer.text)
            why = questions.rejection(
                draft,
                answer.finish,
                category,
                words,
                context,
            ) or self._duplicate(draft, key)
            if why is None and "judge" in self.endpoints:
                judged = questions.JUDGE_TEMPLATE.format(draft=draft, **shown)
                answer = await self._ask(
                    "judge",
                    key,
                    turn,
                    questions.messages_for(judged, uri),
                )
                accepts, feedback = questions.read_verdict(answer) or (False, "")
                if accepts:
                    why = None
                else:
                    why = (
                        "rejected by the judge",
                        feedback or "it does not match the image.",
                    )
                # meanwhile another image may have got the caption
                why = why or self._duplicate(draft, key)
            if why is None:
                self._owners[fold_text(draft)] = key
                return draft
            self._journal.put([draft, *why], key, "rejection", turn)
            self.rejected[why[0]] += 1
            before = (draft, why[1])
        return ""

    def _duplicate(self, draft: str, key: str) -> questions.Rejection | None:
        reason = "another image has the same caption"
        is_free = self._owners.get(fold_text(draft), key) == key
        if is_free:
            return None
        return (reason, f"{reason}; describe what is specific to this one.")

    async def _ask(
        self,
        role: str,
        key: str,
        turn: int,
        messages: list[dict[str, Any]],
    ) -> Completion:
        """Return the response from the journal, or request and record it."""
        if (recorded := self._journal.get(key, role, turn)) is not None:
            return Completion(*recorded)
        answer = await self.endpoints[role].ask(messages)
        if role == "judge" and questions.read_verdict(answer) is None:
            raise EndpointError("the judge gave no verdict")
        self._journal.put(answer, key, role, turn)
        return answer

    def write(self, journal: Journal) -> None:
        """Write the annotations so far."""
        entries: dict[str, Any] = {}
        for name, key in self._keys.items():
            caption, (category, meta) = journal.get(key, "caption"), _folders(name)
            if caption:
                entry = {
                    "file_name": name,
                    "file_path": name,
                    "class_name": category,
                    "meta_category": meta,
                }
                entries[name] = {**entry, "positive": caption, "negative": []}
            elif caption == "":
                self.left_out[name] = "every draft was rejected"
        self.accepted = len(entries)
        write_json(self.options.out, entries)

    def summary(self) -> str:
        lines = [f"{self.options.out}: {self.accepted:,} captions"]
        lines += [
            f"{number:7,} drafts rejected: {reason}"
            for reason, number in self.rejected.most_common()
        ]
        for what, reasons in (
            ("without a caption", self.left_out),
            ("failed, for the next run", self.failed),
        ):
            if reasons:
                lines.append(
                    f"{len(reasons):7,} {what}:"
                    f" {shorten([f'{n} ({why})' for n, why in reasons.items()])}"
                )
        tokens = f"{self.usage['tokens_in']:,} + {self.usage['tokens_out']:,} tokens"
        return "\n".join([*lines, f"{self.usage['requests']:7,} responses, {tokens}"])


def _folders(name: str) -> tuple[str, str]:
    """Return the folder of an image (its category) and the folder above (its
    meta-category); "" for none.
    """
    above, folder = ["", "", *name.split("/")[:-1]][-2:]
    return folder, "" if above in SPLITS else above


def _data_uri(file: Path, side: int) -> str:
    image = open_image(file, at_least=side)
    buffer = io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def caption_images(options: CaptionOptions) -> CaptioningRun:
    """Caption the images and write the annotations. Raise DcarError for images, models
    or files of no use.
    """
    out = options.out
    file = out.with_name(f"{out.stem}.journal.sqlite")
    if out.suffix != ".json":
        raise DataError(
            f"{out}: the annotations are JSON; give --out a name that ends in .json"
        )
    if out.exists() and not file.exists():
        raise DataError(
            f"{out} exists and was not written by this command; give another --out"
        )
    run = CaptioningRun(options)
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(
        out.with_name(f".{out.name}.lock"), f"another run is writing to {out}"
    ):
        if options.restart:
            file.unlink(missing_ok=True)
        with closing(Journal(file, run.settings)) as journal:
            try:
                asyncio.run(run.process(journal))
            except ExceptionGroup as group:
                # of the tasks, the first of which failed and ended the others
                raise group.exceptions[0] from None
            finally:
                run.write(journal)
    return run
