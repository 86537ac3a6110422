"""Pages of the site: functions (Visit) → Response."""
