"""Text for other programs: scrape config, rules, dashboard and ACL policies."""
