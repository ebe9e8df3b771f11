"""The checks every engine makes."""

from __future__ import annotations

import pytest
import torch

from saccade.ops.checks import accumulation_dtype, check_qkv, check_segments, resolve_scale

pytestmark = pytest.mark.quick

Q, K, V = torch.zeros(2, 4, 7, 3), torch.zeros(2, 2, 9, 3), torch.zeros(2, 2, 9, 5)


def test_good_calls_pass():
    check_qkv(Q, K, V)
    check_segments(Q, K, None, None)
    check_segments(Q, K, torch.zeros(1, 7, dtype=torch.int32), torch.zeros(2, 9, dtype=torch.int64))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": [1.0]}, "q of type list: expected a tensor"),
        ({"k": torch.zeros(2, 9, 3)}, r"k of shape \(2, 9, 3\): expected 4 dimensions \[batch, heads, tokens, dim\]"),
        ({"v": V.long()}, "v of dtype torch.int64: expected a floating-point dtype"),
        ({"k": torch.zeros(1, 2, 9, 3)}, r"k of shape \(1, 2, 9, 3\): expected batch 2 and head dim 3, those of q"),
        ({"k": torch.zeros(2, 2, 9, 4)}, r"k of shape \(2, 2, 9, 4\): expected batch 2 and head dim 3"),
        ({"v": torch.zeros(2, 2, 8, 3)}, r"v of shape \(2, 2, 8, 3\): expected \(2, 2, 9\) before the head dim, as k"),
        ({"k": K[:, :0], "v": V[:, :0]}, "k with 0 heads: expected a divisor of q's 4 heads"),
        ({"q": Q[:, :3]}, "k with 2 heads: expected a divisor of q's 3 heads"),
        ({"v": V.half()}, "v is torch.float16 on cpu: expected torch.float32 on cpu, as q"),
        ({"k": K.to("meta")}, "k is torch.float32 on meta: expected torch.float32 on cpu, as q"),
    ],
)
def test_bad_tensors_are_refused(bad, message):
    call = {"q": Q, "k": K, "v": V} | bad
    with pytest.raises(ValueError, match=message):
        check_qkv(**call)


@pytest.mark.parametrize(
    ("q_ids", "kv_ids", "message"),
    [
        (torch.zeros(2, 7).long(), None, "q_segments and kv_segments: expected both or neither"),
        (torch.zeros(7).long(), torch.zeros(2, 9).long(), r"q_segments of shape \(7,\): expected \[2 or 1, 7\]"),
        (torch.zeros(3, 7).long(), torch.zeros(2, 9).long(), r"q_segments of shape \(3, 7\): expected \[2 or 1, 7\]"),
        (torch.zeros(2, 7).long(), torch.zeros(2, 7).long(), r"kv_segments of shape \(2, 7\): expected \[2 or 1, 9\]"),
        (torch.zeros(2, 7), torch.zeros(2, 9).long(), "q_segments of dtype torch.float32: expected an integer dtype"),
        (torch.zeros(2, 7).long(), torch.zeros(2, 9).bool(), "kv_segments of dtype torch.bool: expected an integer"),
    ],
)
def test_bad_segments_are_refused(q_ids, kv_ids, message):
    with pytest.raises(ValueError, match=message):
        check_segments(Q, K, q_ids, kv_ids)


def test_scale_and_accumulation():
    assert resolve_scale(None, 16) == 0.25
    assert resolve_scale(0.0, 16) == 0.0
    assert accumulation_dtype(torch.float64) == torch.float64
    assert {accumulation_dtype(x) for x in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}
