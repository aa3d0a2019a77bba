"""Where the metrics of a run are shown besides metrics.jsonl: a file for each kind of tracker."""
