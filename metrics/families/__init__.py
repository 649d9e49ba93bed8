"""The families of metrics by area: requests, runs, the process. Also what they are compared with: a
request's time budget and a GPU's rated peak."""
