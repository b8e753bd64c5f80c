"""Joins the queries of many clients into batches, and searches one batch at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from agentic_rag_env.errors import RetrieverError
from agentic_rag_env.retrievers.base import Retriever
from agentic_rag_env.types import Found

logger = logging.getLogger(__name__)

#: A query of more characters is long, and is searched alone. Queries of search agents have 20 to 200.
LONG_QUERY_CHARS = 400
#: Most characters of all queries of a batch. Some 500 usual queries have so many, so no batch takes much longer.
MAX_BATCH_CHARS = 2**15


class BusyError(Exception):
    """Too many queries wait already."""


@dataclass(eq=False, slots=True)
class _Part:
    """Queries of one request that are searched together.

    Attributes:
        queries: One long query, or any number of others.
        top_k: Most passages per query.
        arrived: Time of arrival [seconds of the monotonic clock].
        done: Results, or what the search raised.
        is_long: Whether it is one long query.
        num_chars: Number of characters in all queries.
    """

    queries: Sequence[str]
    top_k: int
    arrived: float
    done: asyncio.Future[list[Found]] = field(default_factory=asyncio.Future)
    is_long: bool = field(init=False)
    num_chars: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_chars = sum(map(len, self.queries))
        self.is_long = len(self.queries) == 1 and self.num_chars > LONG_QUERY_CHARS


class Batcher:
    """Joins the queries of concurrent requests into batches, which one thread searches one after the other.

    A batch is searched when it is full, or when its oldest request has waited `max_wait_s`. A request that follows one
    that was alone does not wait. The next batch fills meanwhile. A batch has one `top_k`, since some indexes find other
    passages for another one. Queries that occur twice in a batch are searched once.

    No client can make the others wait for long. A long query is searched alone, and batches of the others take turns
    with it. A request of several long queries, or of very many, is searched in parts, between which others have their
    turn. A request whose client has left is dropped: what is being searched is finished, the rest is not begun.

    Args:
        retriever: Where to search.
        max_batch: Most queries of a batch.
        max_wait_s: Longest wait for company while nothing is searched [seconds].
        max_waiting: Most queries that wait.
        observe_batch: Called with the number of queries of each batch and the seconds its search took.

    Attributes:
        num_waiting: Queries that no search has taken up yet.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        max_batch: int,
        max_wait_s: float,
        max_waiting: int,
        observe_batch: Callable[[int, float], None],
    ) -> None:
        self._retriever = retriever
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._max_waiting = max_waiting
        self._observe_batch = observe_batch
        self.num_waiting = 0
        self._waiting: list[_Part] = []
        self._num_ready = 0
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._expects_company = True
        self._long_was_last = False
        self._searching_since: float | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    @property
    def searching_s(self) -> float:
        """How long the current search has been going on [seconds]; 0 if there is none."""
        return 0.0 if self._searching_since is None else time.monotonic() - self._searching_since

    async def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        """Search together with all others who wait. If cancelled, drop the queries that are not being searched yet.

        Args:
            queries: The queries, at least one and at most `max_batch`.
            top_k: Most passages per query.

        Returns:
            Passages or its own failure for each query.

        Raises:
            BusyError: Too many queries wait already.
            RetrieverError: The search failed.
            Exception: Whatever else the retriever raises.
        """
        if self.num_waiting + len(queries) > self._max_waiting:
            raise BusyError
        distinct = list(dict.fromkeys(queries))
        self.num_waiting += len(distinct)
        num_left = len(distinct)
        found: dict[str, Found] = {}
        try:
            for together in _parts(distinct):
                num_left -= len(together)
                found |= zip(together, await self._search_part(_Part(together, top_k, time.monotonic())), strict=True)
        finally:
            self.num_waiting -= num_left
        return [found[query] for query in queries]

    async def run(self) -> None:
        """Form batches until cancelled. Cancel only when nobody waits, because an unfinished batch is dropped."""
        # The thread is a daemon, because a search that hangs must not keep the process from ending.
        threading.Thread(target=self._work, name="search", daemon=True).start()
        try:
            while True:
                await self._fill()
                if batch := self._take():
                    await self._search(batch)
        finally:
            self._jobs.put(None)

    async def _search_part(self, part: _Part) -> list[Found]:
        self._waiting.append(part)
        self._count_ready(len(part.queries))
        try:
            return await part.done
        except asyncio.CancelledError:
            if part in self._waiting:
                self._remove([part])
            raise

    def _remove(self, parts: Sequence[_Part]) -> None:
        removed, num_queries = set(map(id, parts)), sum(len(part.queries) for part in parts)
        self._waiting = [part for part in self._waiting if id(part) not in removed]
        self.num_waiting -= num_queries
        self._count_ready(-num_queries)

    def _count_ready(self, change: int) -> None:
        self._num_ready += change
        for event, happened in ((self._arrived, self._waiting), (self._full, self._num_ready >= self._max_batch)):
            if happened:
                event.set()
            else:
                event.clear()

    async def _fill(self) -> None:
        """Wait until a batch is full or its oldest part has waited long enough; a long query does not wait."""
        await self._arrived.wait()
        left_s = self._waiting[0].arrived + self._max_wait_s - time.monotonic()
        if self._expects_company and left_s > 0 and not self._waiting[0].is_long:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._full.wait(), left_s)

    def _take(self) -> list[_Part]:
        """Take a long query, or the oldest of the other parts and as many parts with its `top_k` as fit."""
        long = [part for part in self._waiting if part.is_long]
        others = [part for part in self._waiting if not part.is_long]
        self._long_was_last = bool(long) and not (others and self._long_was_last)
        batch = long[:1] if self._long_was_last else self._fitting(others)
        self._expects_company = len(self._waiting) > 1
        self._remove(batch)
        return batch

    def _fitting(self, parts: Sequence[_Part]) -> list[_Part]:
        batch: list[_Part] = []
        room, chars_left = self._max_batch, MAX_BATCH_CHARS
        for part in parts:
            fits = len(part.queries) <= room and (part.num_chars <= chars_left or not batch)
            if fits and part.top_k == parts[0].top_k:
                batch.append(part)
                room -= len(part.queries)
                chars_left -= part.num_chars
        return batch

    async def _search(self, batch: list[_Part]) -> None:
        loop = asyncio.get_running_loop()
        finished = asyncio.Event()

        def job() -> None:
            outcomes = self._outcomes(batch)
            with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
                loop.call_soon_threadsafe(deliver, outcomes)

        def deliver(outcomes: list[list[Found] | Exception]) -> None:
            for part, outcome in zip(batch, outcomes, strict=True):
                if part.done.done():
                    continue
                if isinstance(outcome, Exception):
                    part.done.set_exception(outcome)
                else:
                    part.done.set_result(outcome)
            finished.set()

        start = self._searching_since = time.monotonic()
        self._jobs.put(job)
        await finished.wait()
        self._searching_since = None
        self._observe_batch(sum(len(part.queries) for part in batch), time.monotonic() - start)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _outcomes(self, batch: Sequence[_Part]) -> list[list[Found] | Exception]:
        """The results or the failure of each part of a batch."""
        try:
            return list(self._search_together(batch))
        except RetrieverError as error:
            return [error] * len(batch)
        except Exception as error:
            if len(batch) == 1:
                logger.exception("The retriever failed for %.500r", list(batch[0].queries))
                return [error]
            # One query that breaks the retriever must not cost the others their results.
            return [outcome for part in batch for outcome in self._outcomes([part])]

    def _search_together(self, batch: Sequence[_Part]) -> list[list[Found]]:
        distinct = list(dict.fromkeys(query for part in batch for query in part.queries))
        results = self._retriever.search(distinct, batch[0].top_k)
        if len(results) != len(distinct):
            raise ValueError(f"The retriever returned {len(results)} results for {len(distinct)} queries.")
        found: dict[str, Found] = dict(zip(distinct, results, strict=True))
        return [[found[query] for query in part.queries] for part in batch]


def _parts(queries: Sequence[str]) -> Iterator[list[str]]:
    """The queries that are searched together: first the usual ones in large parts, then each long one alone."""
    part: list[str] = []
    num_chars = 0
    for query in queries:
        if len(query) > LONG_QUERY_CHARS:
            continue
        if num_chars + len(query) > MAX_BATCH_CHARS:
            yield part
            part, num_chars = [], 0
        part.append(query)
        num_chars += len(query)
    if part:
        yield part
    yield from ([query] for query in queries if len(query) > LONG_QUERY_CHARS)
