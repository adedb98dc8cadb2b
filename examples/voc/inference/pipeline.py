"""The pipeline from image files to mask files. Reading, network, refinement and writing of different images overlap."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from ..dataset.errors import DataError
from ..devices import is_out_of_memory
from .claims import Claim
from .outputs import Outputs
from .pictures import Picture, read_picture
from .refine import Refine
from .segmenter import Segmenter, SoftMasks
from .sources import Source, name_clashes

Status = Literal["segmented", "done before", "elsewhere", "skipped"]


class Outcome(NamedTuple):
    """The result for one image: the probabilities [C] of its classes if it has a mask, the reason if it was skipped.

    An image with the status "elsewhere" is being segmented by another process.
    """

    name: str
    status: Status
    probabilities: Sequence[float] = ()
    reason: str = ""


class Work(NamedTuple):
    """An image that this process segments, and the key of its outputs."""

    source: Source
    key: str
    picture: Picture
    claim: Claim


class Pipeline:
    """The steps from an image file to mask files.

    Args:
        segmenter: the network.
        max_pixels: a larger image is reduced.
        outputs: the files to write.
        refine: a function that returns the class indices of a picture after the refinement, or None for no refinement.
        workers: number of threads that read, and of threads that refine and write.
    """

    def __init__(self, segmenter: Segmenter, max_pixels: int, outputs: Outputs, refine: Refine, workers: int) -> None:
        self.segmenter = segmenter
        self.max_pixels = max_pixels
        self.outputs = outputs
        self.refine = refine
        self.workers = workers

    def run(
        self, sources: Sequence[Source], all_sources: Sequence[Source], report: Callable[[Source, Outcome], object]
    ) -> None:
        """Segment the images and report the outcome of each, in their order.

        If a step fails, the masks that the network has computed are still written and reported; then the error is
        raised. `all_sources` are the images of all processes. If two have the same name, the second is skipped.
        """
        clashes = name_clashes(all_sources)
        readers, writers = ThreadPoolExecutor(self.workers), ThreadPoolExecutor(self.workers)
        ahead: deque[Future[Work | Outcome]] = deque()
        behind: deque[tuple[Source, Future[Outcome]]] = deque()
        coming = iter(sources)
        try:
            for source in sources:
                for other in islice(coming, 1 + self.workers - len(ahead)):
                    ahead.append(readers.submit(self.read, other, clashes.get(other.path)))
                behind.append((source, self.compute(source, ahead.popleft().result(), writers)))
                while len(behind) > self.workers or (behind and behind[0][1].done()):  # a bound on memory
                    report(behind[0][0], behind[0][1].result())
                    behind.popleft()
            while behind:
                report(behind[0][0], behind[0][1].result())
                behind.popleft()
        finally:
            readers.shutdown(cancel_futures=True)
            writers.shutdown()
            for reading in ahead:
                if not reading.cancelled() and reading.exception() is None:
                    work = reading.result()
                    if isinstance(work, Work):
                        work.claim.release()
            for source, written in behind:
                if written.exception() is None:
                    report(source, written.result())

    def read(self, source: Source, clash: Path | None) -> Work | Outcome:
        """Claim an image that is not done, and read it."""
        if clash is not None:
            return Outcome(source.name, "skipped", reason=f"its mask would overwrite that of {clash}")
        claim = self.outputs.claim(source)
        if claim is None:
            return Outcome(source.name, "elsewhere")
        try:
            key = self.outputs.key(source)  # first: the file may be replaced while it is read
            probabilities = self.outputs.find(source, key)
            if probabilities is None:
                return Work(source, key, read_picture(source.path, self.max_pixels), claim)
            claim.release()
            return Outcome(source.name, "done before", probabilities)
        except DataError as error:
            claim.release()
            return Outcome(source.name, "skipped", reason=str(error))
        except BaseException as error:
            claim.release()
            if not is_out_of_memory(error):
                raise
            return too_little_memory(source)

    def compute(self, source: Source, work: Work | Outcome, writers: ThreadPoolExecutor) -> Future[Outcome]:
        """Run the network, and submit the refinement and writing to a thread."""
        if isinstance(work, Work):
            try:
                soft = self.segmenter(work.picture, source.labels)
                return writers.submit(self.write, work, soft)
            except DataError as error:
                work.claim.release()
                work = Outcome(source.name, "skipped", reason=str(error))
            except BaseException as error:
                work.claim.release()
                if not is_out_of_memory(error):
                    raise
                work = too_little_memory(source)
        known: Future[Outcome] = Future()
        known.set_result(work)
        return known

    def write(self, work: Work, soft: SoftMasks) -> Outcome:
        """Refine the masks and write the outputs."""
        try:
            refined = self.refine(work.picture, soft)
            self.outputs.write(work.source, work.key, work.picture, soft, refined)
            return Outcome(work.source.name, "segmented", soft.probabilities.tolist())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return too_little_memory(work.source)
        finally:
            work.claim.release()


def too_little_memory(source: Source) -> Outcome:
    """Return the outcome of an image that is too large for the machine."""
    reason = "not enough memory: try a lower --max-pixels, or smaller --scales"
    return Outcome(source.name, "skipped", reason=reason)
