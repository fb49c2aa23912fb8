"""The known data sets: sizes, classes, normalisation, where to get them. Imports neither torch nor NumPy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from multifire.config import DataConfig
from multifire.utils.errors import unknown

DIGIT_NAMES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_LABELS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR100_NAMES = tuple(CIFAR100_LABELS.split())
GESTURE_NAMES = (
    "hand clapping",
    "right hand wave",
    "left hand wave",
    "right arm clockwise",
    "right arm counter-clockwise",
    "left arm clockwise",
    "left arm counter-clockwise",
    "arm roll",
    "air drums",
    "air guitar",
    "other",
)
GESTURE_MIRROR = (0, 2, 1, 6, 5, 4, 3, 7, 8, 9, 10)
NCALTECH101_LABELS = """
BACKGROUND_Google Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai
brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body
cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar elephant
emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill headphone hedgehog
helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus mandolin mayfly menorah
metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid revolver rhino rooster saxophone
schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus stop_sign strawberry sunflower tick
trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench yin_yang
"""
NCALTECH101_NAMES = tuple(NCALTECH101_LABELS.split())
DVS_LIP_WORDS = """
accused action allow allowed america american another around attacks banks become being benefit benefits between billion
called capital challenge change chief couple court death described difference different during economic education
election england evening everything exactly general germany giving ground happen happened having heavy house hundreds
immigration judge labour leaders legal little london majority meeting military million minutes missing needs number
numbers paying perhaps point potential press price question really right russia russian saying security several should
significant spend spent started still support syria syrian taken taking terms these thing think times tomorrow under
warning water welcome words worst years young
"""
DVS_LIP_NAMES = tuple(DVS_LIP_WORDS.split())
ASL_NAMES = tuple("abcdefghiklmnopqrstuvwxy")
FASHION_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class Download:
    """One file of a data set, as its authors publish it."""

    url: str
    filename: str
    size: int
    """Bytes."""
    checksum: str
    """algorithm:hexdigest."""


@dataclass(frozen=True)
class DatasetInfo:
    """Description of a data set; of those in DATASETS it is known before they are read."""

    about: str
    channels: int
    size: int
    """Height of an image or a sensor, in pixels, and its width unless `width` says otherwise."""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Mean of each channel over the training images, for pixels in 0..1; empty for events, not normalised."""
    std: tuple[float, ...]
    """Standard deviation of each channel; empty for events."""
    published_sizes: tuple[int, int]
    """Training and test samples."""
    downloads: tuple[Download, ...] = ()
    """Empty if the data set is embedded in the package, or if `fetch` says how to get it."""
    fetch: str = ""
    """How to get files that a program may not download, and where to put them."""
    events: bool = False
    """True for recordings of an event camera with size × size pixels; channels are OFF and ON."""
    simulated: bool = False
    """True if the events are computed from images."""
    mirror: tuple[int, ...] = ()
    """Class of the mirror image of each class; empty if it is the class itself."""
    width: int | None = None
    """Width of an image or a sensor, in pixels; None: as the height."""
    official_split: bool = True
    """False if the authors publish no split: of published_sizes only the sum counts then, and 20 % are for the test."""
    timesteps: int | None = None
    """Number of frames T of each sample of event frames that were made elsewhere; None: DataConfig.timesteps."""

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of an image or a sensor, in pixels."""
        return self.size, self.width or self.size

    def is_published(self, train: int, test: int) -> bool:
        """Return True if so many samples are those of the published data set."""
        if not self.official_split:
            return train + test == sum(self.published_sizes)
        return (train, test) == self.published_sizes


def _idx_downloads(base_url: str, sizes_and_md5s: dict[str, tuple[int, str]]) -> tuple[Download, ...]:
    return tuple(
        Download(f"{base_url}/{filename}", filename, size, f"md5:{md5}")
        for filename, (size, md5) in sizes_and_md5s.items()
    )


DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(
        about="5,000 MNIST digits, embedded",
        channels=1,
        size=28,
        classes=DIGIT_NAMES,
        mean=(0.1307,),
        std=(0.3081,),
        published_sizes=(4_000, 1_000),
    ),
    "cifar10": DatasetInfo(
        about="CIFAR-10: small colour photographs of ten kinds of thing",
        channels=3,
        size=32,
        classes=CIFAR10_NAMES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        published_sizes=(50_000, 10_000),
        downloads=(
            Download(
                url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                filename="cifar-10-binary.tar.gz",
                size=170_052_171,
                checksum="sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
    ),
    "cifar100": DatasetInfo(
        about="CIFAR-100: small colour photographs of a hundred kinds of thing",
        channels=3,
        size=32,
        classes=CIFAR100_NAMES,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        published_sizes=(50_000, 10_000),
        downloads=(
            Download(
                url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                filename="cifar-100-binary.tar.gz",
                size=168_513_733,
                checksum="sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
    ),
    "mnist": DatasetInfo(
        about="MNIST: handwritten digits",
        channels=1,
        size=28,
        classes=DIGIT_NAMES,
        mean=(0.1307,),
        std=(0.3081,),
        published_sizes=(60_000, 10_000),
        downloads=_idx_downloads(
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            {
                "train-images-idx3-ubyte.gz": (9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                "train-labels-idx1-ubyte.gz": (28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
                "t10k-images-idx3-ubyte.gz": (1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
                "t10k-labels-idx1-ubyte.gz": (4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
            },
        ),
    ),
    "fashion-mnist": DatasetInfo(
        about="Fashion-MNIST: grey pictures of clothes",
        channels=1,
        size=28,
        classes=FASHION_NAMES,
        mean=(0.2860,),
        std=(0.3530,),
        published_sizes=(60_000, 10_000),
        downloads=_idx_downloads(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            {
                "train-images-idx3-ubyte.gz": (26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                "train-labels-idx1-ubyte.gz": (29_515, "25c81989df183df01b3e8a0aad5dffbe"),
                "t10k-images-idx3-ubyte.gz": (4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
                "t10k-labels-idx1-ubyte.gz": (5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
            },
        ),
    ),
    "dvs-gesture": DatasetInfo(
        about="DVS128 Gesture: eleven gestures of 29 people under three lights, DVS128 camera",
        channels=2,
        size=128,
        classes=GESTURE_NAMES,
        mean=(),
        std=(),
        published_sizes=(1_176, 288),
        fetch="IBM asks who downloads it: get DvsGesture.tar.gz (about 3 GB) from "
        "https://research.ibm.com/interactive/dvsgesture/",
        events=True,
        mirror=GESTURE_MIRROR,
    ),
    "cifar10-dvs": DatasetInfo(
        about="CIFAR10-DVS: 10,000 CIFAR-10 images moved before a DVS128 camera",
        channels=2,
        size=128,
        classes=CIFAR10_NAMES,
        mean=(),
        std=(),
        published_sizes=(9_000, 1_000),
        downloads=tuple(
            Download(f"https://ndownloader.figshare.com/files/{number}", f"{name}.zip", size, f"md5:{md5}")
            for name, number, size, md5 in (
                ("airplane", 7712788, 747_054_427, "0afd5c4bf9ae06af762a77b180354fdd"),
                ("automobile", 7712791, 970_159_102, "8438dfeba3bc970c94962d995b1b9bdd"),
                ("bird", 7712794, 760_766_288, "a9c207c91c55b9dc2002dc21c684d785"),
                ("cat", 7712812, 843_271_197, "52c63c677c2b15fa5146a8daf4d56687"),
                ("deer", 7712815, 778_283_422, "b6bf21f6c04d21ba4e23fc3e36c8a4a3"),
                ("dog", 7712818, 844_609_875, "f379ebdf6703d16e0a690782e62639c3"),
                ("frog", 7712842, 818_824_848, "cad6ed91214b1c7388a5f6ee56d08803"),
                ("horse", 7712851, 929_265_395, "e7cbbf77bec584ffbf913f00e682782a"),
                ("ship", 7712836, 742_404_857, "41c7bd7d6b251be82557c6cce9a7d5c9"),
                ("truck", 7712839, 950_111_954, "89f3922fd147d9aeff89e76a2b0b70a7"),
            )
        ),
        events=True,
    ),
    "nmnist": DatasetInfo(
        about="N-MNIST: MNIST before an ATIS camera that makes three saccades",
        channels=2,
        size=34,
        classes=DIGIT_NAMES,
        mean=(),
        std=(),
        published_sizes=(60_000, 10_000),
        fetch="get Train.zip and Test.zip (1.2 GB, CC BY-SA 4.0) from https://data.mendeley.com/datasets/468j46mzdv",
        events=True,
    ),
    "ncaltech101": DatasetInfo(
        about="N-Caltech101: pictures of a hundred kinds of thing before an ATIS camera that makes three saccades",
        channels=2,
        size=180,
        width=240,
        classes=NCALTECH101_NAMES,
        mean=(),
        std=(),
        published_sizes=(6_967, 1_742),
        official_split=False,
        fetch="get Caltech101.zip (CC BY 4.0) from https://www.garrickorchard.com/datasets/n-caltech101",
        events=True,
    ),
    "dvs-lip": DatasetInfo(
        about="DVS-Lip: a hundred spoken words, the lips before a DVS346 camera",
        channels=2,
        size=128,
        classes=DVS_LIP_NAMES,
        mean=(),
        std=(),
        published_sizes=(14_896, 4_975),
        fetch="get DVS-Lip.zip from https://sites.google.com/view/event-based-lipreading",
        events=True,
    ),
    "asl-dvs": DatasetInfo(
        about="ASL-DVS: 24 letters of the American sign language before a DAVIS240C camera",
        channels=2,
        size=180,
        width=240,
        classes=ASL_NAMES,
        mean=(),
        std=(),
        published_sizes=(80_640, 20_160),
        official_split=False,
        fetch="get ICCV2019_DVS_dataset.zip from https://github.com/PIX2NVS/NVS2Graph and unpack it once, to Yin*.zip",
        events=True,
    ),
    "digits-dvs": DatasetInfo(
        about="simulated: saccades over the embedded digits",
        channels=2,
        size=34,
        classes=DIGIT_NAMES,
        mean=(),
        std=(),
        published_sizes=(4_000, 1_000),
        events=True,
        simulated=True,
    ),
}
"""Descriptions of the data sets that multifire reads, by name."""


OWN_DATA: dict[str, str] = {
    "folder": "own pictures: train/CLASS/*.png, jpg or webp, and test/CLASS likewise",
    "npz": "own arrays: x_train, y_train, x_test, y_test, or images and labels, in one .npz file",
    "recordings": "own recordings of an event camera: CLASS/FILE in any format that `multifire data prepare` knows",
}
"""Data sets whose classes and sizes are known when they are read."""
REGISTERED: dict[str, Callable[[DataConfig], Any]] = {}
"""Functions that return an own data set; see `register_dataset`."""
Maker = TypeVar("Maker", bound=Callable[..., Any])


def register_dataset(name: str) -> Callable[[Maker], Maker]:
    """Register a function or class as the data set `name`, for `--data.name NAME` and `multifire.datasets.load`.

    It is called with the DataConfig of a run and returns a `multifire.datasets.Dataset`, a pair (train, test), or an
    object with the attributes `train` and `test`. Each part is a pair of arrays (samples, labels) as for `from_arrays`,
    or a torch Dataset. An attribute `classes` names the classes, an attribute `augment` is called on training batches
    (see `multifire.datasets.loader.Augment`).

    Raises:
        ValueError: the name exists.
    """

    def register(maker: Maker) -> Maker:
        if name in DATASETS or is_own(name):
            raise ValueError(f"a data set {name!r} exists already; register yours under another name")
        REGISTERED[name] = maker
        return maker

    return register


def is_own(name: str) -> bool:
    """Return True if the description of the data set `name` comes from its samples."""
    return name in OWN_DATA or name in REGISTERED


def needs_preparation(name: str) -> bool:
    """Return True if the data set `name` holds recordings, which `multifire data prepare` cuts into frames."""
    return name == "recordings" or (not is_own(name) and get_info(name).events)


def get_info(name: str) -> DatasetInfo:
    """Return the description of the data set `name`, which is known before it is read.

    Raises:
        ValueError: unknown data set (suggests the nearest name), or one that must be read; see `describe`.
    """
    if is_own(name):
        raise ValueError(
            f"the classes of {name!r} are known when its samples are read; use multifire.datasets.describe"
        )
    if name not in DATASETS:
        raise unknown("data set", name, [*DATASETS, *OWN_DATA, *REGISTERED])
    return DATASETS[name]
