"""Things on a bus: each is `read(offset, size)` and `write(offset, data)`, and knows neither VM nor vCPU."""
