"""Names of documents and pieces, and lanes' states: the texts that checkpoints and logs hold."""

import json

from train.data import document_refs, mixture


def test_a_document_has_this_text():
    document_ref = document_refs.DocumentRef("my-texts.v2", 17, 3)
    assert document_ref.to_text() == "my-texts.v2:17:3"
    assert document_refs.DocumentRef.from_text("my-texts.v2:17:3") == document_ref


def test_a_pending_piece_has_this_text():
    piece_ref = document_refs.PendingPieceRef("short:4:0", 64, 69, 128)
    assert piece_ref.to_text() == "short:4:0@64-69/128"
    assert document_refs.PendingPieceRef.from_text("short:4:0@64-69/128") == piece_ref


def test_only_a_segment_within_a_document_names_its_start():
    assert document_refs.segment_to_text("short:4:0", 0) == "short:4:0"
    assert document_refs.segment_to_text("short:4:0", 64) == "short:4:0@64"


def test_a_lane_has_this_json():
    text = (
        '{"read": {"short": 2, "chat": 0}, "tokens": {"short": 90, "chat": 0}, "dropped": 1, '
        '"waiting": ["short:4:0@64-69/69", "short:7:0@0-21/21"]}'
    )
    state = mixture.LaneState.from_json(json.loads(text))
    assert state.num_dropped == 1
    assert state.pending[0] == document_refs.PendingPieceRef("short:4:0", 64, 69, 69)
    assert json.dumps(state.to_json()) == text


def test_a_lane_without_a_row_so_far_is_an_empty_object():
    assert mixture.LaneState().to_json() == {}
    assert mixture.LaneState.from_json({}) == mixture.LaneState()
