"""The only importer of Ray: router, target, draft, routing, discovery, the application builder."""
