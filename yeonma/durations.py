"""Durations for people to read, in the language of help."""

from __future__ import annotations

from yeonma.messages import tr


def in_two_units(seconds: float) -> str:
    """A duration in its two largest units: `59s`, `12m03s`, `1h01m`, `1d01h`."""
    whole = round(seconds)
    if whole < 60:
        return tr("{seconds}s", seconds=whole)
    if whole < 3600:
        return tr("{minutes}m{seconds:02d}s", minutes=whole // 60, seconds=whole % 60)
    if whole < 86_400:
        return tr("{hours}h{minutes:02d}m", hours=whole // 3600, minutes=whole % 3600 // 60)
    return tr("{days}d{hours:02d}h", days=whole // 86_400, hours=whole % 86_400 // 3600)


def estimated(seconds: float) -> str:
    """An estimate, in units as coarse as it is: `under 1s`, `42s`, `12m` or `1h40m`."""
    if seconds < 1:
        return tr("under 1s")
    if seconds < 100:
        return tr("{seconds}s", seconds=round(seconds))
    minutes = round(seconds / 60)
    if minutes < 100:
        return tr("{minutes}m", minutes=minutes)
    return tr("{hours}h{minutes:02d}m", hours=minutes // 60, minutes=minutes % 60)
