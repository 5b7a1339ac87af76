"""Sends a request as it is written in a file and saves the answer's body.

usage: send.py HOST:PORT REQUEST-FILE BODY-FILE
"""
import http.client
import socket
import sys

host, port = sys.argv[1].rsplit(":", 1)
with open(sys.argv[2]) as f:
    request = f.read().strip()

with socket.create_connection((host, int(port)), timeout=30) as s:
    s.sendall("\r\n".join(request.splitlines()).encode() + b"\r\n\r\n")
    response = http.client.HTTPResponse(s, method="POST")
    response.begin()
    body = response.read()
if response.status != 200:
    sys.exit(f"{response.status} {body!r}")
with open(sys.argv[3], "wb") as f:
    f.write(body)
