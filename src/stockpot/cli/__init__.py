"""The command line: argv to api calls, results to text or JSON, errors to exit codes."""
