import urllib.request, json, time, sys
start = time.time()
while time.time() - start < 240:
    try:
        urllib.request.urlopen("http://127.0.0.1:8080/ready", timeout=5); break
    except Exception as e: time.sleep(0.3)
print("ready after", round(time.time() - start, 1))
req = urllib.request.Request("http://127.0.0.1:8080/", json.dumps({"prompt": "a red circle", "num_inference_steps": 2}).encode(), {"content-type": "application/json"})
a = json.load(urllib.request.urlopen(req, timeout=100)); print(a["image"]["url"][:40], a["timings"]["denoise_ms"])
