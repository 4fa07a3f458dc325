"""What a server keeps to tell of: text, and not more than a page can draw."""

from __future__ import annotations

import pytest

from nbgpu_lab.notices import MESSAGE_MOST, Notices


@pytest.mark.parametrize("message", [None, {}, 7, ["a"]])
def test_a_notice_that_says_no_text_is_not_kept(message: object) -> None:
    notices = Notices()
    with pytest.raises(TypeError):
        notices.add({"kind": "refused", "message": message})
    assert notices.after(0) == []


def test_a_notice_is_cut_where_a_page_would_stand_still() -> None:
    kept = Notices().add({"kind": "refused", "message": "x" * 10**6})
    assert len(kept["message"]) == MESSAGE_MOST + 1
