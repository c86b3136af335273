"""Videos, shards, order, views: from slots to clips, in whatever process reads them."""
