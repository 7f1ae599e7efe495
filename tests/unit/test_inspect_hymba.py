"""`inspect` of a Hymba: what its blocks are, who shares keys and values, what the cache holds."""

from __future__ import annotations


def test_inspect_as_json(halflap):
    found = halflap("inspect", "hymba-1.5b", "--context", "8000", "--json").json
    assert found["parameters"] == 1_522_797_824 and found["pattern"] == "H-" * 32
    assert len(found["key_value_sources"]) == 15 and found["key_value_sources"]["36"] == 32
    assert found["blocks"][0]["attention"].get("window") is None and found["blocks"][2]["attention"]["window"] == 1024
    published = {name: round(value / 1e6, 3) for name, value in found["cache_as_published"]["bytes"].items()}
    assert published == {
        "keys_and_values": 73.605,
        "with_meta_tokens": 77.783,
        "without_states": 78.602,
        "everything": 81.879,
    }
    more = halflap("inspect", "hymba-1.5b", "--context", "1000", "8192", "--json").json["cache_as_published"][
        "by_context"
    ]
    everything = {context: round(sums["everything"] / 1e6, 3) for context, sums in more.items()}
    assert everything == {"1000": 40.914, "8000": 81.879, "8192": 82.985}
    assert found["cache_bytes"]["8000"] == sum(found["cache_parts"]["8000"].values())


def test_inspect_for_people(halflap):
    shown = halflap("inspect", "hymba-1.5b", "--context", "8000").out
    assert "36 of 32" in shown and "window 1,024" in shown
    sums = (
        "8,000 tokens, all in float16, MB of 10^6 bytes: keys and values 73.605, with meta tokens 77.783, "
        "without states 78.602, everything 81.879"
    )
    assert sums in " ".join(shown.split())
