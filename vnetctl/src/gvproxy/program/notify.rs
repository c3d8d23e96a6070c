//! The notifications of `-notification`: one connection to the socket an event, one JSON object in a line.
//!
//! The queue is bounded; what finds no room is dropped, and told in the log. A listener that is gone, or takes its
//! time, keeps nothing else waiting.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// Events that wait to be sent; as many as the peer's.
const QUEUE_MAX: usize = 100;
/// How long a listener may take for one.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long until a listener with no room for a connection is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// What is told. The names and fields are gvproxy's where it has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Notification {
    /// What happened.
    #[serde(rename = "notification_type")]
    pub kind: Kind,
    /// The VM's MAC address, as it claims.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mac_address: String,
    /// The VM's name. vnet's own.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub vm: String,
    /// Of [`Kind::DhcpAssigned`]: the address. vnet's own.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub ip_address: String,
    /// Of [`Kind::HypervisorError`]: what is wrong. vnet's own.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub error: String,
    /// Of [`Kind::NetworkPolicyPending`]: what is asked, and how to answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Everything listens.
    Ready,
    /// The first frame of a VM came.
    ConnectionEstablished,
    /// A VM is gone.
    ConnectionClosed,
    /// A hypervisor's socket failed.
    HypervisorError,
    /// A VM was given an address by DHCP.
    DhcpAssigned,
    /// Something is held, and a person is asked.
    NetworkPolicyPending,
}

/// What is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Details {
    /// `tcp`, `udp`, `icmp` or `dns`; `expose/tcp` or `expose/udp` of a port that a guest asks to open.
    pub protocol: String,
    /// The destination; empty of a lookup. Of a port to open, where.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub ip: String,
    /// Its port; none where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u32>,
    /// The name, where one is known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The request's id.
    pub id: String,
    /// What a person types to say yes.
    pub answer: String,
}

impl Notification {
    /// An event of this kind, and nothing else said.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            mac_address: String::new(),
            vm: String::new(),
            ip_address: String::new(),
            error: String::new(),
            details: None,
        }
    }
}

/// Tells them, to nobody where nobody is named.
#[derive(Debug, Clone, Default)]
pub struct Notifier {
    queue: Option<mpsc::Sender<Notification>>,
    /// Those that found no room since this was told of.
    dropped: Arc<AtomicU64>,
}

impl Notifier {
    /// Sends to the socket at this path.
    pub fn start(path: Option<PathBuf>) -> Self {
        let Some(path) = path else {
            return Self::default();
        };
        let (queue, mut events) = mpsc::channel(QUEUE_MAX);
        let dropped = Arc::<AtomicU64>::default();
        let of_queue = Arc::clone(&dropped);
        tokio::spawn(async move {
            // A line when it begins and one when it is over, however many are lost between.
            let mut lost = 0_u64;
            while let Some(event) = events.recv().await {
                let sent = tokio::time::timeout(PATIENCE, send(&path, &event)).await;
                let error = match sent {
                    Ok(Ok(())) => None,
                    Ok(Err(error)) => Some(error.to_string()),
                    Err(_) => Some(format!("nothing was taken within {} s", PATIENCE.as_secs())),
                };
                let socket = path.display();
                match error {
                    Some(error) => {
                        if lost == 0 {
                            tracing::warn!(%socket, error, "a notification could not be sent");
                        }
                        lost += 1;
                    }
                    None if lost > 0 => {
                        tracing::warn!(%socket, "notifications are taken again; {lost} could not be sent");
                        lost = 0;
                    }
                    None => {}
                }
                if events.is_empty() {
                    let dropped = of_queue.swap(0, Ordering::Relaxed);
                    if dropped > 1 {
                        tracing::warn!(%socket, "{dropped} notifications were dropped, as {QUEUE_MAX} waited");
                    }
                }
            }
        });
        Self {
            queue: Some(queue),
            dropped,
        }
    }

    /// Tells of an event. Never waits.
    pub fn tell(&self, event: Notification) {
        if let Some(queue) = &self.queue
            && let Err(error) = queue.try_send(event)
            && self.dropped.fetch_add(1, Ordering::Relaxed) == 0
        {
            let kind = error.into_inner().kind;
            tracing::warn!(?kind, "{QUEUE_MAX} notifications wait already; one was dropped");
        }
    }
}

async fn send(path: &std::path::Path, event: &Notification) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let mut socket = loop {
        match UnixStream::connect(path).await {
            // Its backlog is full.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => tokio::time::sleep(RETRY).await,
            connected => break connected?,
        }
    };
    socket.write_all(&line).await?;
    socket.shutdown().await
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tokio::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn each_event_is_a_line_on_a_connection_of_its_own() {
        let path = std::env::temp_dir().join(format!("vnetctl-notify-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let notifier = Notifier::start(Some(path.clone()));

        notifier.tell(Notification::new(Kind::Ready));
        notifier.tell(Notification {
            mac_address: "5a:94:ef:e4:0c:ee".to_owned(),
            ip_address: "192.168.127.2".to_owned(),
            ..Notification::new(Kind::DhcpAssigned)
        });
        let mut lines = Vec::new();
        for _ in 0..2 {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut line = String::new();
            socket.read_to_string(&mut line).await.unwrap();
            lines.push(line);
        }
        std::fs::remove_file(&path).unwrap();

        assert_eq!(
            lines,
            [
                "{\"notification_type\":\"ready\"}\n",
                "{\"notification_type\":\"dhcp_assigned\",\"mac_address\":\"5a:94:ef:e4:0c:ee\",\"ip_address\":\"192.168.127.2\"}\n",
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_listener_that_is_busy_is_waited_for() {
        const EVENTS: usize = 8;
        let path = std::env::temp_dir().join(format!("vnetctl-notify-busy-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let socket = tokio::net::UnixSocket::new_stream().unwrap();
        socket.bind(&path).unwrap();
        let listener = socket.listen(0).unwrap();
        // Until its backlog is full.
        let mut others = 0;
        while UnixStream::connect(&path).await.is_ok() {
            others += 1;
        }
        let notifier = Notifier::start(Some(path.clone()));
        for _ in 0..EVENTS {
            notifier.tell(Notification::new(Kind::Ready));
        }
        // Time goes on only when the first was tried.
        tokio::time::sleep(RETRY / 2).await;
        for _ in 0..others {
            listener.accept().await.unwrap();
        }
        for _ in 0..EVENTS {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut line = String::new();
            socket.read_to_string(&mut line).await.unwrap();
            assert_eq!(line, "{\"notification_type\":\"ready\"}\n");
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[tokio::test]
    async fn one_too_many_is_dropped_and_nobody_waits() {
        let (queue, mut events) = mpsc::channel(QUEUE_MAX);
        let notifier = Notifier {
            queue: Some(queue),
            dropped: Arc::default(),
        };
        for _ in 0..=QUEUE_MAX {
            notifier.tell(Notification::new(Kind::Ready));
        }
        drop(notifier);
        let mut count = 0;
        while events.recv().await.is_some() {
            count += 1;
        }
        assert_eq!(count, QUEUE_MAX);
        Notifier::default().tell(Notification::new(Kind::Ready));
    }
}
