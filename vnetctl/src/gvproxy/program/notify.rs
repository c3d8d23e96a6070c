//! The notifications of `-notification`: one connection to the socket an event, one JSON object in a line.
//!
//! The queue is bounded; what finds no room is dropped, and told in the log. A listener that is gone, or takes its time,
//! keeps nothing else waiting.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// Events that wait to be sent; as many as the peer's.
const QUEUE_MAX: usize = 100;
/// How long a listener may take for one.
const PATIENCE: Duration = Duration::from_secs(5);

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
    /// `tcp`, `udp`, `icmp` or `dns`.
    pub protocol: String,
    /// The destination; empty of a lookup.
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
}

impl Notifier {
    /// Sends to the socket at this path.
    pub fn start(path: Option<PathBuf>) -> Self {
        let Some(path) = path else {
            return Self::default();
        };
        let (queue, mut events) = mpsc::channel(QUEUE_MAX);
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                let sent = tokio::time::timeout(PATIENCE, send(&path, &event)).await;
                let error = match sent {
                    Ok(Ok(())) => continue,
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => format!("nothing was taken within {} s", PATIENCE.as_secs()),
                };
                tracing::warn!(socket = %path.display(), error, "a notification could not be sent");
            }
        });
        Self { queue: Some(queue) }
    }

    /// Tells of an event. Never waits.
    pub fn tell(&self, event: Notification) {
        if let Some(queue) = &self.queue
            && let Err(error) = queue.try_send(event)
        {
            let kind = error.into_inner().kind;
            tracing::warn!(?kind, "{QUEUE_MAX} notifications wait already; one was dropped");
        }
    }
}

async fn send(path: &std::path::Path, event: &Notification) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    let mut socket = UnixStream::connect(path).await?;
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

    #[tokio::test]
    async fn one_too_many_is_dropped_and_nobody_waits() {
        let (queue, mut events) = mpsc::channel(QUEUE_MAX);
        let notifier = Notifier { queue: Some(queue) };
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
