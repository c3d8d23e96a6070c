//! Requests as clients send them, byte for byte, against a controlplane in this process, and a dataplane that does
//! what it is told; against one that answers from a script, where what it refuses matters; and against none.

mod approval;
mod connection;
mod forwarder;
mod guest;
mod names;
mod world;

use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::*;

/// The other end of a connection that is served.
fn connect(services: &Arc<Services>, origin: Origin) -> DuplexStream {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let services = Arc::clone(services);
    tokio::spawn(async move { services.serve_stream(theirs, Vec::new(), origin).await });
    ours
}

/// Everything that a request is answered, but for its date.
async fn raw(services: &Arc<Services>, origin: Origin, request: &str) -> String {
    let mut stream = connect(services, origin);
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let lines = answer.split_inclusive("\r\n");
    lines.filter(|line| !line.starts_with("Date: ")).collect()
}

/// A request of a method; its answer's status and body.
async fn ask(
    services: &Arc<Services>,
    origin: Origin,
    method: &str,
    path: &str,
    body: &str,
) -> (u16, String) {
    let length = body.len();
    let request =
        format!("{method} {path} HTTP/1.1\r\nHost: gvproxy\r\nContent-Length: {length}\r\n\r\n{body}");
    let answer = raw(services, origin, &request).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    (
        status.unwrap_or_else(|| panic!("no status: {answer:?}")),
        body.to_owned(),
    )
}

async fn get(services: &Arc<Services>, origin: Origin, path: &str) -> (u16, String) {
    ask(services, origin, "GET", path, "").await
}

async fn post(services: &Arc<Services>, origin: Origin, path: &str, body: &str) -> (u16, String) {
    ask(services, origin, "POST", path, body).await
}

/// What `expose` and such things answer when they are done.
fn done() -> (u16, String) {
    (200, String::new())
}

fn refused(status: u16, text: &str) -> (u16, String) {
    (status, format!("{text}\n"))
}
