"""Reports: the leaderboard, charts, and one self-contained HTML page."""
