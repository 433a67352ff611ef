"""Names of TPU slices, against tables of the Cloud TPU and GKE documentation."""

from __future__ import annotations

import pytest

from t5x_ext.contracts import UserError
from t5x_ext.parallel.tpu_names import tpu_slice

# topology: chips, machines, gcloud, node label of GKE
DOCUMENTED = {
    "v4:2x2x1": (4, 1, "--accelerator-type=v4-8", "tpu-v4-podslice"),
    "v4:2x2x4": (16, 4, "--accelerator-type=v4-32", "tpu-v4-podslice"),
    "v4:4x4x4": (64, 16, "--accelerator-type=v4-128", "tpu-v4-podslice"),
    "v4:8x8x8": (512, 128, "--accelerator-type=v4-1024", "tpu-v4-podslice"),
    "v5e:2x2": (4, 1, "--accelerator-type=v5litepod-4", "tpu-v5-lite-podslice"),
    "v5e:4x8": (32, 8, "--accelerator-type=v5litepod-32", "tpu-v5-lite-podslice"),
    "v5e:8x8": (64, 16, "--accelerator-type=v5litepod-64", "tpu-v5-lite-podslice"),
    "v5e:16x16": (256, 64, "--accelerator-type=v5litepod-256", "tpu-v5-lite-podslice"),
    "v5p:2x2x2": (8, 2, "--accelerator-type=v5p-16", "tpu-v5p-slice"),
    "v5p:4x4x4": (64, 16, "--accelerator-type=v5p-128", "tpu-v5p-slice"),
    "v5p:16x16x24": (6144, 1536, "--accelerator-type=v5p-12288", "tpu-v5p-slice"),
    "v5p:4x4x12": (192, 48, "--type=v5p --topology=4x4x12", "tpu-v5p-slice"),
    "v6e:1x1": (1, 1, "--accelerator-type=v6e-1", "tpu-v6e-slice"),
    "v6e:8x8": (64, 16, "--accelerator-type=v6e-64", "tpu-v6e-slice"),
}


@pytest.mark.parametrize("topology", DOCUMENTED)
def test_a_slice_has_the_documented_names(topology: str) -> None:
    slice_ = tpu_slice(topology)
    chips, hosts, gcloud, gke = DOCUMENTED[topology]
    assert (slice_.chips, slice_.hosts, " ".join(slice_.gcloud_flags), slice_.gke_accelerator) == (
        chips,
        hosts,
        gcloud,
        gke,
    )
    assert slice_.hosts * slice_.chips_per_host == chips


@pytest.mark.parametrize(
    ("topology", "what"),
    [
        ("", "known: v4, v5e"),
        ("8x8", "give a generation"),
        ("v5litepod-64", "as v5e:8x8"),
        ("v3:8x8", "known: v4"),
        ("v5e:", "v5e has the shapes"),
        ("v5e:8x7", "8x16"),
        ("v5e:8x8x1", "v5e has the shapes"),
        ("v5e:16x8", "8x16"),
        ("v6e:32x32", "v6e has the shapes"),
        ("v4:8x8", "multiples of 4"),
        ("v4:8x4x4", "A <= B <= C"),
        ("v4:4x4x6", "multiples of 4"),
        ("v4:16x16x24", "4,096 chips"),
        ("v5p:16x24x24", "6,144 chips"),
        ("v5p:0x4x4", "multiples of 4"),
    ],
)
def test_what_nobody_rents_out_is_refused(topology: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        tpu_slice(topology)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
