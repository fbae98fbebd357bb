"""Where rows come from: one file a source. Each gives :class:`~continual.streams.sources.rows.Rows`."""
