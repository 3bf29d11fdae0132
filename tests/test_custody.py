from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from PIL import Image
from pydantic import SecretStr
from support.image_kinds import KINDS

from flux_prefect.api.answers import RawAnswer
from flux_prefect.api.client import AimlApiClient, Timeouts
from flux_prefect.api.models import Generation, ImageRequest
from flux_prefect.api.pacing import Pacer
from flux_prefect.custody import Order, download, generate, metered, obtain, recover
from flux_prefect.errors import (
    AnswerLost,
    Billed,
    BrokenImage,
    ContentFlagged,
    EmptyGeneration,
    ImageGone,
    ImageUnwritable,
    InvalidResponse,
    NotAnImage,
    NotSent,
    RepeatLimitReached,
    RequestRefused,
    ServiceError,
    SpoolUnwritable,
    UnexpectedFormat,
    UnexpectedSize,
)
from flux_prefect.host.spool import KeptAnswer, PaidCall, Spool

KEY = "aiml-secret-1f2e3d4c"
ROOT = "http://127.0.0.1:9"
REQUEST = ImageRequest(prompt="a lighthouse", seed=7)
FINGERPRINT = REQUEST.fingerprint(ROOT)


def _encode(image: Image.Image, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


SIZE = (464, 256)  # 16:9 as the service rounds it, and small
IMAGE = _encode(Image.linear_gradient("L").resize(SIZE).convert("RGB"))
OTHER_IMAGE = _encode(Image.radial_gradient("L").resize(SIZE).convert("RGB"))
PNG = _encode(Image.radial_gradient("L").resize(SIZE).convert("RGB"), "PNG")
PLACEHOLDER = _encode(Image.new("RGB", (120, 90), "gray"))
BLACK = _encode(Image.new("RGB", SIZE))


class Service:
    """Both ends of the network, inside the process.

    Attributes:
        answer: what the service does with a POST.
        files: what the images' host has, by path.
        fetched: the paths that were asked for.
    """

    def __init__(self) -> None:
        self.answer: Callable[[httpx.Request], Awaitable[httpx.Response]] = self.answer_with_url
        self.files: dict[str, bytes] = {"/0.jpg": IMAGE}
        self.posts: list[httpx.Request] = []
        self.fetched: list[str] = []

    async def answer_with_url(self, _: httpx.Request) -> httpx.Response:
        """The usual answer."""
        return _answer({"url": f"{ROOT}/0.jpg"})

    async def post(self, request: httpx.Request) -> httpx.Response:
        """What the transport calls."""
        self.posts.append(request)
        return await self.answer(request)

    def fetch(self, request: httpx.Request) -> httpx.Response:
        """What the transport of downloads calls."""
        self.fetched.append(request.url.path)
        content = self.files.get(request.url.path)
        return httpx.Response(404) if content is None else httpx.Response(200, content=content)


def _answer(*data: dict[str, Any], credits_used: float = 168_000, **body: Any) -> httpx.Response:
    return httpx.Response(
        200, json={"data": list(data), "meta": {"usage": {"credits_used": credits_used}}, "seed": 7, **body}
    )


def _inline(content: bytes = IMAGE) -> dict[str, str]:
    return {"b64_json": base64.b64encode(content).decode()}


@pytest.fixture
def service() -> Service:
    """The stand-in for the network."""
    return Service()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """A spool that is not there yet."""
    return Spool(tmp_path / "spool")


@pytest.fixture
async def client(service: Service) -> AsyncIterator[AimlApiClient]:
    """A client over the stand-in."""
    async with AimlApiClient(
        api_key=SecretStr(KEY),
        base_url=ROOT,
        pacer=Pacer(4),
        timeouts=Timeouts(pacing=0),
        transport=httpx.MockTransport(service.post),
        download_transport=httpx.MockTransport(service.fetch),
    ) as client:
        yield client


def _files(spool: Spool, folder: str) -> list[Path]:
    return sorted((spool.root / folder).iterdir())


class TestNotes:
    """What the host knows of a call while it is out, and after."""

    async def test_a_call_is_noted_before_it_goes_out(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """At the moment of the POST its note is on the disk, with everything that finds it again."""
        seen: list[PaidCall] = []

        async def look(request: httpx.Request) -> httpx.Response:
            seen.extend(spool.open_calls())
            return await service.answer_with_url(request)

        service.answer = look
        generation = await generate(REQUEST, client, spool, order=Order(task_run_id="run-1"))

        (call,) = seen
        assert call.client_request_id == service.posts[0].headers["X-Client-Request-Id"]
        assert call.client_request_id == generation.client_request_id
        assert (call.fingerprint, call.endpoint, call.task_run_id) == (FINGERPRINT, ROOT, "run-1")
        assert (call.billed, call.error) == (Billed.UNKNOWN, None)

    async def test_an_answer_ends_the_note_and_is_kept(self, client: AimlApiClient, spool: Spool) -> None:
        """The record is in the spool when the answer is returned, and nothing is open."""
        generation = await generate(REQUEST, client, spool)
        assert spool.find_generation(FINGERPRINT) == generation
        assert spool.open_calls() == []
        assert _files(spool, "calls") == []

    async def test_a_lost_answer_stays_noted(self, service: Service, client: AimlApiClient, spool: Spool) -> None:
        """The note says that it may have been paid for, and how the answer was lost."""

        async def cut(_: httpx.Request) -> httpx.Response:
            raise httpx.ReadTimeout("")

        service.answer = cut
        with pytest.raises(AnswerLost) as lost:
            await generate(REQUEST, client, spool, order=Order(task_run_id="run-1"))
        (call,) = spool.open_calls(FINGERPRINT)
        assert (call.billed, call.error, call.task_run_id) == (Billed.UNKNOWN, lost.value.message, "run-1")
        assert spool.find_generation(FINGERPRINT) is None

    async def test_an_empty_answer_that_was_billed_stays_noted_as_billed(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """Its cost is known, its image never came."""

        async def empty(_: httpx.Request) -> httpx.Response:
            return _answer()

        service.answer = empty
        with metered() as calls, pytest.raises(EmptyGeneration):
            await generate(REQUEST, client, spool)
        (call,) = spool.open_calls()
        assert call.billed is Billed.YES
        assert calls[0].credits_used == 168_000

    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (lambda: httpx.Response(400, json={"message": "bad prompt"}), RequestRefused),
            (lambda: httpx.Response(500), ServiceError),
            (lambda: _answer(credits_used=0), EmptyGeneration),
        ],
    )
    async def test_a_refusal_ends_the_note(
        self,
        service: Service,
        client: AimlApiClient,
        spool: Spool,
        answer: Callable[[], httpx.Response],
        error: type[ServiceError],
    ) -> None:
        """What was not billed leaves no trace of money."""

        async def refuse(_: httpx.Request) -> httpx.Response:
            return answer()

        service.answer = refuse
        with pytest.raises(error) as refusal:
            await generate(REQUEST, client, spool)
        assert refusal.value.billed is Billed.NO
        assert spool.open_calls() == []

    async def test_a_call_that_never_went_out_leaves_no_note(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """Without a connection nothing was paid."""

        async def unreachable(_: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        service.answer = unreachable
        with pytest.raises(NotSent):
            await generate(REQUEST, client, spool)
        assert spool.open_calls() == []

    async def test_a_cancelled_call_stays_noted(self, service: Service, client: AimlApiClient, spool: Spool) -> None:
        """A cancellation in flight leaves it open whether the call was paid, and so does the note."""
        out = asyncio.Event()

        async def hang(_: httpx.Request) -> httpx.Response:
            out.set()
            await asyncio.sleep(60)
            raise AssertionError

        service.answer = hang
        task = asyncio.create_task(generate(REQUEST, client, spool))
        await out.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (call,) = spool.open_calls(FINGERPRINT)
        assert (call.billed, call.error) == (Billed.UNKNOWN, None)

    async def test_a_call_that_waits_after_a_refusal_is_not_noted(self, service: Service, spool: Spool) -> None:
        """429 was not billed: a call that is cancelled in the pause after it owes nothing."""
        refused = asyncio.Event()

        async def refuse(_: httpx.Request) -> httpx.Response:
            refused.set()
            return httpx.Response(429, headers={"Retry-After": "30"})

        service.answer = refuse
        async with AimlApiClient(
            api_key=SecretStr(KEY), base_url=ROOT, pacer=Pacer(4), transport=httpx.MockTransport(service.post)
        ) as client:
            task = asyncio.create_task(generate(REQUEST, client, spool))
            await refused.wait()
            await asyncio.sleep(0.05)  # into the pause
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert spool.open_calls() == []

    async def test_a_call_without_a_seed_is_noted_as_such(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """It has no fingerprint before its answer; the answer's is by the seed that the service reports."""

        async def cut(_: httpx.Request) -> httpx.Response:
            raise httpx.ReadError("")

        seedless = REQUEST.model_copy(update={"seed": None})
        generation = await generate(seedless, client, spool)
        assert generation.fingerprint == FINGERPRINT
        service.answer = cut
        with pytest.raises(AnswerLost):
            await generate(seedless, client, spool)
        assert [call.fingerprint for call in spool.open_calls()] == ["unseeded"]

    async def test_an_unwritable_spool_stops_the_call(
        self, service: Service, client: AimlApiClient, tmp_path: Path
    ) -> None:
        """What could not be kept is not paid for."""
        (tmp_path / "in the way").touch()
        with pytest.raises(SpoolUnwritable):
            await generate(REQUEST, client, Spool(tmp_path / "in the way"))
        assert service.posts == []

    async def test_nothing_secret_is_in_the_spool(self, service: Service, client: AimlApiClient, spool: Spool) -> None:
        """Neither records nor notes hold the API key, even where the service quotes it."""
        await generate(REQUEST, client, spool)

        async def quote(request: httpx.Request) -> httpx.Response:
            return httpx.Response(504, json={"message": f"timeout for {request.headers['Authorization']}"})

        service.answer = quote
        with pytest.raises(ServiceError):
            await generate(REQUEST, client, spool)
        (record,), (note,) = _files(spool, "records"), _files(spool, "calls")
        assert KEY not in record.read_text() + note.read_text()


class SlowDisk(Spool):
    """A spool that takes its time over records.

    Attributes:
        reached: set once a record is about to be written.
        goes_on: lets it be written.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reached, self.goes_on = threading.Event(), threading.Event()

    def keep_generation(self, generation: Generation) -> None:
        """Keep it, after a while."""
        self.reached.set()
        assert self.goes_on.wait(30)
        super().keep_generation(generation)


class TestCustody:
    """An answer that came is never lost."""

    async def test_a_cancelled_task_keeps_its_answer_first(self, client: AimlApiClient, spool: Spool) -> None:
        """A task's own cancel, as by Ctrl-C, takes effect after the record is written."""
        disk = SlowDisk(spool.root)
        task = asyncio.create_task(generate(REQUEST, client, disk))
        await asyncio.to_thread(disk.reached.wait, 30)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        disk.goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert recover(REQUEST, ROOT, spool) is not None
        assert spool.open_calls() == []

    async def test_a_cancelled_scope_keeps_its_answer_first(self, client: AimlApiClient, spool: Spool) -> None:
        """A time-out around the step takes effect after the record is written."""
        disk = SlowDisk(spool.root)
        threading.Timer(0.15, disk.goes_on.set).start()
        with anyio.move_on_after(0.1):
            await generate(REQUEST, client, disk)
        assert disk.goes_on.is_set()
        assert recover(REQUEST, ROOT, spool) is not None
        assert spool.open_calls() == []

    async def test_a_disk_that_cannot_take_the_record_does_not_lose_the_answer(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """The whole record is returned, inline bytes with it, and its image can be downloaded."""

        async def fill_disk(_: httpx.Request) -> httpx.Response:
            (spool.root / "records").touch()
            return _answer(_inline())

        service.answer = fill_disk
        generation = await generate(REQUEST, client, spool)
        assert generation.images[0].url is not None
        assert generation.images[0].url.startswith("data:image/jpeg;base64,")
        assert len(spool.open_calls()) == 1  # this host has no record of it, so the note stays

        (spool.root / "records").unlink()
        file = await download(generation, 0, client, spool)
        assert file.path.read_bytes() == IMAGE

    async def test_what_was_paid_for_is_recovered(self, client: AimlApiClient, spool: Spool) -> None:
        """The spool's record is the answer, for this request at this endpoint alone."""
        assert recover(REQUEST, ROOT, spool) is None
        generation = await generate(REQUEST, client, spool)
        assert recover(REQUEST, ROOT, spool) == generation
        assert recover(REQUEST, f"{ROOT}/", spool) == generation
        assert recover(REQUEST, "https://api.aimlapi.com", spool) is None
        assert recover(REQUEST.model_copy(update={"seed": 8}), ROOT, spool) is None
        assert recover(REQUEST.model_copy(update={"seed": None}), ROOT, spool) is None


class TestInlineImages:
    """Images that come inside the answer."""

    @pytest.fixture(autouse=True)
    def inline(self, service: Service) -> None:
        """The service answers with the bytes themselves."""

        async def answer(_: httpx.Request) -> httpx.Response:
            return _answer(_inline(), {"url": f"{ROOT}/0.jpg"})

        service.answer = answer

    async def test_the_record_that_is_passed_on_is_small(self, client: AimlApiClient, spool: Spool) -> None:
        """Bytes stay in the spool: generated or recovered, no record carries them through Prefect."""
        generation = await generate(REQUEST, client, spool)
        recovered = recover(REQUEST, ROOT, spool)
        assert [image.url for image in generation.images] == [None, f"{ROOT}/0.jpg"]
        assert recovered == generation
        assert len(generation.model_dump_json()) < 1500

    async def test_the_bytes_are_found_again(self, service: Service, client: AimlApiClient, spool: Spool) -> None:
        """Downloading such an image needs no network."""
        generation = await generate(REQUEST, client, spool)
        file = await download(generation, 0, client, spool)
        assert file.path.read_bytes() == IMAGE
        assert service.fetched == []

    async def test_bytes_that_are_gone_are_gone(self, client: AimlApiClient, spool: Spool, tmp_path: Path) -> None:
        """Another host, or a spool that was cleared, says so and can't say more."""
        generation = await generate(REQUEST, client, spool)
        with pytest.raises(ImageGone, match="no longer has it"):
            await download(generation, 0, client, Spool(tmp_path / "another"))


class TestMetering:
    """The accounts of a run."""

    async def test_every_call_is_counted_with_what_it_means_for_money(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """Billed, unbilled and unknown calls are distinguished; what ends in tasks started inside counts as well."""

        async def refuse(_: httpx.Request) -> httpx.Response:
            return httpx.Response(400, json={"message": "bad"})

        async def cut(_: httpx.Request) -> httpx.Response:
            raise httpx.ReadError("")

        with metered() as calls:
            generation = await asyncio.create_task(generate(REQUEST, client, spool))
            for service.answer, error in ((refuse, RequestRefused), (cut, AnswerLost)):
                with pytest.raises(error):
                    await generate(REQUEST, client, spool)
        assert [(call.billed, call.credits_used) for call in calls] == [
            (Billed.YES, 168_000),
            (Billed.NO, None),
            (Billed.UNKNOWN, None),
        ]
        assert calls[0].client_request_id == generation.client_request_id

    async def test_meters_do_not_count_for_each_other(self, client: AimlApiClient, spool: Spool) -> None:
        """Two requests at the same time have a meter each, and calls outside are not counted."""

        async def produce(seed: int) -> int:
            with metered() as calls:
                await generate(REQUEST.model_copy(update={"seed": seed}), client, spool)
                return len(calls)

        assert list(await asyncio.gather(produce(1), produce(2))) == [1, 1]
        with metered() as calls:
            pass
        await generate(REQUEST, client, spool)
        assert calls == []


class TestDownload:
    """From an answer to a file."""

    async def test_an_image_is_brought_in_as_it_was_delivered(self, client: AimlApiClient, spool: Spool) -> None:
        """Byte for byte, measured, with its answer."""
        generation = await generate(REQUEST, client, spool)
        file = await download(generation, 0, client, spool)
        assert file.path.read_bytes() == IMAGE
        assert (file.width, file.height, file.size, file.index) == (*SIZE, len(IMAGE), 0)
        assert file.generation == generation
        assert file.path == spool.image_path(generation, 0)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_an_image_of_any_kind_is_brought_in_as_it_was_delivered(
        self, kind: str, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """With its orientation, profile and provenance; a turned one has the shape asked for as it is shown."""
        content = service.files["/0.jpg"] = KINDS[kind]
        form = "webp" if "WEBP" in kind else "png" if content.startswith(b"\x89PNG") else "jpeg"
        request = ImageRequest(
            prompt="a lighthouse",
            seed=7,
            model="blackforestlabs/flux-2",
            output_format=form,
            image_size="landscape_16_9",
        )
        generation = await generate(request, client, spool)
        file = await download(generation, 0, client, spool)
        assert file.path.read_bytes() == content
        assert not file.black

    async def test_an_image_paid_for_anew_is_not_the_old_one(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """The old answer's bytes go with its record."""
        old = await download(await generate(REQUEST, client, spool), 0, client, spool)
        service.files["/0.jpg"] = OTHER_IMAGE
        new = await download(await generate(REQUEST, client, spool), 0, client, spool)
        assert old.path == new.path
        assert new.path.read_bytes() == OTHER_IMAGE

    async def test_an_image_of_another_format_is_not_fetched_twice(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """It is in custody: a URL that dies meanwhile must not look as if it were gone."""
        service.files["/0.jpg"] = PNG
        generation = await generate(REQUEST, client, spool)
        for _ in range(2):
            with pytest.raises(UnexpectedFormat, match="is kept as"):
                await download(generation, 0, client, spool)
        assert service.fetched == ["/0.jpg"]
        assert spool.rejected_path(generation, 0).read_bytes() == PNG

    @pytest.mark.parametrize("fault", ["broken", "placeholder"])
    async def test_an_image_that_the_service_delivers_wrong_is_not_fetched_without_end(
        self, fault: str, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """Twice, over all runs, and then never, also where its URL has died: nothing is paid for it again."""
        body = service.files["/0.jpg"] = IMAGE[:-100] if fault == "broken" else PLACEHOLDER
        final = []
        for run in range(4):
            generation, _ = await obtain(REQUEST, client, spool, Order())
            with pytest.raises(BrokenImage if fault == "broken" else UnexpectedSize) as raised:
                await download(generation, 0, client, spool)
            final.append(not raised.value.retryable)
            if run == 1:
                service.files.clear()
        assert final == [False, True, True, True]
        assert "kept as" in raised.value.message
        assert "Remove that file" in raised.value.message
        assert (len(service.posts), service.fetched) == (1, ["/0.jpg"] * 2)
        assert spool.rejected_path(generation, 0).read_bytes() == body

        service.files["/0.jpg"] = IMAGE
        spool.rejected_path(generation, 0).unlink()
        assert (await download(generation, 0, client, spool)).path.read_bytes() == IMAGE

    async def test_a_placeholder_that_an_earlier_release_took_is_not_published(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """Nor is anything fetched or paid for it; a release that accepts it takes it back."""
        generation = await generate(REQUEST, client, spool)
        spool.keep_image(generation, 0, PLACEHOLDER)
        with pytest.raises(UnexpectedSize, match="120 x 90 pixels where aspect_ratio asked for 16:9"):
            await download(generation, 0, client, spool)
        assert service.fetched == []
        spool.rejected_path(generation, 0).write_bytes(IMAGE)
        assert (await download(generation, 0, client, spool)).path == spool.image_path(generation, 0)
        assert not spool.rejected_path(generation, 0).exists()

    @pytest.mark.parametrize("size", [(120, 90), (464, 256)])
    async def test_the_announced_size_counts_first(
        self, size: tuple[int, int], service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """Also where the image has the ratio asked for."""

        async def announce(_: httpx.Request) -> httpx.Response:
            return _answer({"url": f"{ROOT}/0.jpg", "width": 1392, "height": 752})

        service.answer = announce
        service.files["/0.jpg"] = _encode(Image.new("RGB", size, "red"))
        generation = await generate(REQUEST, client, spool)
        with pytest.raises(UnexpectedSize, match=r"where the service announced 1392 x 752"):
            await download(generation, 0, client, spool)
        service.files["/0.jpg"] = _encode(Image.new("RGB", (1392, 752), "red"))
        assert (await download(generation, 0, client, spool)).width == 1392

    async def test_a_whole_file_is_not_fetched_again(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """What is in the spool needs no URL that still lives."""
        generation = await generate(REQUEST, client, spool)
        first = await download(generation, 0, client, spool)
        service.files.clear()
        assert await download(generation, 0, client, spool) == first
        assert service.fetched == ["/0.jpg"]

    async def test_a_cut_file_is_fetched_again(self, service: Service, client: AimlApiClient, spool: Spool) -> None:
        """Half an image in the spool is replaced, never passed on."""
        generation = await generate(REQUEST, client, spool)
        first = await download(generation, 0, client, spool)
        first.path.write_bytes(IMAGE[:-100])
        assert await download(generation, 0, client, spool) == first
        assert service.fetched == ["/0.jpg", "/0.jpg"]

    async def test_a_dead_url_is_gone(self, service: Service, client: AimlApiClient, spool: Spool) -> None:
        """The error says that fetching again won't help."""
        generation = await generate(REQUEST, client, spool)
        service.files.clear()
        with pytest.raises(ImageGone) as gone:
            await download(generation, 0, client, spool)
        assert not gone.value.retryable

    async def test_a_broken_delivery_can_be_repeated(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """The answer stays good."""
        generation = await generate(REQUEST, client, spool)
        service.files["/0.jpg"] = IMAGE[:100]
        with pytest.raises(NotAnImage) as broken:
            await download(generation, 0, client, spool)
        assert broken.value.retryable
        service.files["/0.jpg"] = IMAGE
        await download(generation, 0, client, spool)

    async def test_a_flagged_image_is_left_alone(self, service: Service, client: AimlApiClient, spool: Spool) -> None:
        """It is not even fetched."""

        async def flag(_: httpx.Request) -> httpx.Response:
            return _answer({"url": f"{ROOT}/0.jpg"}, has_nsfw_concepts=[True])

        service.answer = flag
        generation = await generate(REQUEST, client, spool)
        with pytest.raises(ContentFlagged) as flagged:
            await download(generation, 0, client, spool)
        assert flagged.value.billed is Billed.YES
        assert not flagged.value.retryable
        assert service.fetched == []

    async def test_a_black_image_counts_as_flagged(self, service: Service, client: AimlApiClient, spool: Spool) -> None:
        """Also when it is in the spool already, and without being fetched again."""
        service.files["/0.jpg"] = BLACK
        generation = await generate(REQUEST, client, spool)
        for _ in range(2):
            with pytest.raises(ContentFlagged, match="black all over"):
                await download(generation, 0, client, spool)
        assert service.fetched == ["/0.jpg"]

    async def test_an_image_that_is_not_in_the_answer_is_missed(
        self, service: Service, client: AimlApiClient, spool: Spool
    ) -> None:
        """Asked for two and sent one: the first is good, the second an error that repeating won't help."""
        generation = await generate(REQUEST.model_copy(update={"num_images": 2}), client, spool)
        await download(generation, 0, client, spool)
        with pytest.raises(EmptyGeneration, match="no image 1") as missed:
            await download(generation, 1, client, spool)
        assert missed.value.billed is Billed.YES
        assert not missed.value.retryable
        assert service.fetched == ["/0.jpg"]

    async def test_an_unwritable_spool_is_named(self, client: AimlApiClient, spool: Spool) -> None:
        """The error names the folder, before anything is fetched, and stops a batch."""
        generation = await generate(REQUEST, client, spool)
        with pytest.raises(ImageUnwritable, match=r"spool folder /proc/flux/pictures"):
            await download(generation, 0, client, Spool(Path("/proc/flux")))


async def test_an_answer_that_is_no_json_stays_noted(service: Service, client: AimlApiClient, spool: Spool) -> None:
    """A success that can't be read may have been paid."""

    async def nonsense(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text="<html>")

    service.answer = nonsense
    with pytest.raises(InvalidResponse):
        await generate(REQUEST, client, spool)
    assert [call.billed for call in spool.open_calls(FINGERPRINT)] == [Billed.UNKNOWN]


async def test_an_answer_is_kept_before_a_slot_is_released(service: Service, spool: Spool) -> None:
    """A limit's server that takes its time to take the slot back endangers nothing that was paid for."""
    kept: list[int] = []

    @asynccontextmanager
    async def gate() -> AsyncIterator[None]:
        yield
        kept.append(len(_files(spool, "answers")))

    async with AimlApiClient(
        api_key=SecretStr(KEY), base_url=ROOT, pacer=Pacer(4), gate=gate, transport=httpx.MockTransport(service.post)
    ) as client:
        await generate(REQUEST, client, spool)

    assert kept == [1]
    assert _files(spool, "answers") == []  # recorded as a generation meanwhile
    assert spool.find_generation(FINGERPRINT) is not None


async def test_a_kept_answer_is_taken_up_by_the_next_look(
    service: Service, client: AimlApiClient, spool: Spool
) -> None:
    """A process that died between the answer and its record has paid for nothing in vain."""
    answered = await service.answer_with_url(httpx.Request("POST", ROOT))
    call = PaidCall(
        client_request_id="fp-1",
        fingerprint=FINGERPRINT,
        endpoint=ROOT,
        sent_at=datetime.now(timezone.utc),
        task_run_id=None,
    )
    spool.open_call(call)
    spool.keep_answer(KeptAnswer(call=call, request=REQUEST, answer=RawAnswer.of(answered.content, answered.headers)))

    generation, paid = await obtain(REQUEST, client, spool, Order())

    assert not paid
    assert generation.client_request_id == "fp-1"
    assert service.posts == []
    assert spool.open_calls() == []
    assert _files(spool, "answers") == []


async def test_a_request_that_is_not_sent_again_says_what_each_lost_call_cost(
    service: Service, client: AimlApiClient, spool: Spool
) -> None:
    """By the service's log: one was billed, the other is not in it."""
    lost: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            lost.append(request.headers["X-Client-Request-Id"])
            raise httpx.ReadTimeout("")
        row = {
            "created": datetime.now(timezone.utc).isoformat(),
            "status": "success",
            "client_request_id": lost[0],
            "cost": {"credits": 168_000},
        }
        return httpx.Response(200, json={"data": [row]})

    service.answer = answer
    for _ in range(2):
        with pytest.raises(AnswerLost):
            await obtain(REQUEST, client, spool, Order())
    with pytest.raises(RepeatLimitReached) as refused:
        await obtain(REQUEST, client, spool, Order())

    assert f"{lost[0]} billed with 168,000 credits ($0.08)" in refused.value.message
    assert f"{lost[1]} possibly billed" in refused.value.message
    assert len(lost) == 2


async def test_an_answer_in_an_unknown_shape_is_kept_with_its_address(
    service: Service, client: AimlApiClient, spool: Spool
) -> None:
    """It was paid for: the body lies in the spool, and the error names the file."""
    body = {"output": {"images": ["https://cdn.example/0.jpg"]}, "meta": {"usage": {"credits_used": 168_000}}}

    async def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=body)

    service.answer = answer
    with pytest.raises(EmptyGeneration) as caught:
        await obtain(REQUEST, client, spool, Order())

    (kept,) = spool.kept_answers(FINGERPRINT)
    assert json.loads(kept.answer.content) == body
    assert str(spool.answer_path(kept.call)) in caught.value.message
    assert caught.value.billed is Billed.YES
    assert [call.billed for call in spool.open_calls(FINGERPRINT)] == [Billed.YES]
