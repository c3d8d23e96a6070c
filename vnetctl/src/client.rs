//! The connection to a controlplane: where it is, how long an answer may take, whose it is.
//!
//! Without `--server` it is the user's own, and a command that needs it starts it (`launch`). With
//! `--server` nothing is started: whoever named a server means that one.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;
use vnet_proto::v1;

use crate::failure::Failure;
use crate::output::text::safe;

/// Where a controlplane answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix://") {
            return if path.starts_with('/') {
                Ok(Self::Unix(PathBuf::from(path)))
            } else {
                Err(format!(
                    "{text:?} has no absolute path (expected one as unix:///run/user/1000/vnet/control.sock)"
                ))
            };
        }
        if text.starts_with('/') {
            return Ok(Self::Unix(PathBuf::from(text)));
        }
        match text.split_once("://").map(|(scheme, _)| scheme) {
            Some(scheme @ ("https" | "tcp" | "http")) => Err(format!(
                "{scheme}:// controlplanes cannot be reached yet (expected unix:///PATH, on this machine)"
            )),
            _ => Err(format!(
                "{text:?} is not a controlplane's address (expected unix:///PATH)"
            )),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing listens there.
    #[error("no controlplane answers at {server}")]
    Absent {
        /// Where it was looked for.
        server: Server,
    },
    /// Something is in the way.
    #[error("cannot connect to the controlplane at {server}: {source}")]
    Refused {
        /// Where.
        server: Server,
        /// What is in the way.
        source: io::Error,
    },
}

/// A connected client of every service that people use.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
}

/// One generated client.
macro_rules! service {
    ($($(#[$doc:meta])* $name:ident: $module:ident::$client:ident;)*) => {
        impl Client {$(
            $(#[$doc])*
            pub fn $name(&self) -> v1::$module::$client<Channel> {
                v1::$module::$client::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
            }
        )*}
    };
}

service! {
    /// Policies.
    policy: policy_service_client::PolicyServiceClient;
    /// Pending requests.
    pending: pending_service_client::PendingServiceClient;
    /// Grants.
    grants: grant_service_client::GrantServiceClient;
    /// VMs.
    vms: vm_service_client::VmServiceClient;
    /// Flows.
    flows: flow_service_client::FlowServiceClient;
    /// Forwards.
    forwards: forward_service_client::ForwardServiceClient;
    /// DNS.
    dns: dns_service_client::DnsServiceClient;
    /// Events.
    events: event_service_client::EventServiceClient;
}

impl Client {
    /// Connects, or says that nothing answers.
    ///
    /// # Errors
    /// [`ConnectError::Absent`] when nobody listens, [`ConnectError::Refused`] for anything else.
    pub async fn connect(server: &Server) -> Result<Self, ConnectError> {
        let Server::Unix(path) = server;
        // Asked first by hand: the transport's own errors do not tell absence from refusal.
        if let Err(source) = UnixStream::connect(path).await {
            return Err(match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ConnectError::Absent {
                    server: server.clone(),
                },
                _ => ConnectError::Refused {
                    server: server.clone(),
                    source,
                },
            });
        }
        let path = path.clone();
        let connector = service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The authority is never resolved; the connector above dials the socket.
        let channel = Endpoint::from_static("http://controlplane.vnet.internal")
            .connect_timeout(CONNECT_PATIENCE)
            .connect_with_connector(connector)
            .await
            .map_err(|e| ConnectError::Refused {
                server: server.clone(),
                source: io::Error::other(e),
            })?;
        Ok(Self { channel })
    }

    /// Whether it answers: not merely accepts, but serves.
    pub async fn answers(&self) -> bool {
        let request = with_patience(
            v1::ListVmsRequest {
                page_size: 1,
                ..Default::default()
            },
            PROBE_PATIENCE,
        );
        self.vms().list_vms(request).await.is_ok()
    }
}

/// What a command must know to find its controlplane.
#[derive(Debug, Clone)]
pub struct Connection {
    /// The one that was named, if one was.
    pub named: Option<Server>,
}

impl Connection {
    /// Where it is.
    ///
    /// # Errors
    /// When the user's own place for sockets cannot be used.
    pub fn server(&self) -> Result<Server, Failure> {
        match &self.named {
            Some(server) => Ok(server.clone()),
            None => crate::launch::own_server(),
        }
    }

    /// Connects. The user's own controlplane is started if it does not answer.
    ///
    /// # Errors
    /// When the named one does not answer, or the user's own cannot be started.
    pub async fn open(&self) -> Result<Client, Failure> {
        let server = self.server()?;
        match (Client::connect(&server).await, &self.named) {
            (Ok(client), _) => Ok(client),
            (Err(ConnectError::Absent { .. }), None) => crate::launch::controlplane(&server).await,
            (Err(error @ ConnectError::Absent { .. }), Some(Server::Unix(path))) => Err(Failure::Failed(
                format!("{}\n  {}", safe(&error.to_string()), how_to_start(path)),
            )),
            (Err(error), _) => Err(Failure::Failed(safe(&error.to_string()).into_owned())),
        }
    }
}

fn how_to_start(path: &Path) -> String {
    let path = path.display();
    format!(
        "start one with: vnet-controlplane --listen unix://{path}\n  \
         or leave --server and VNET_SERVER out: vnetctl then uses your own, and starts it when needed"
    )
}

/// A request that is given up after `UNARY_PATIENCE`.
pub fn unary<T>(message: T) -> tonic::Request<T> {
    with_patience(message, UNARY_PATIENCE)
}

/// A request that reads the whole history, or asks every dataplane, and may take minutes.
pub fn unhurried<T>(message: T) -> tonic::Request<T> {
    with_patience(message, UNHURRIED_PATIENCE)
}

fn with_patience<T>(message: T, patience: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(patience);
    request
}

/// Reads every page of a list, at most [`LIST_ITEMS_MAX`] items.
///
/// # Errors
/// The first refusal; or more items than the limit, rather than a list that looks whole.
pub async fn pages<T, F, Fut>(mut page: F) -> Result<Vec<T>, Failure>
where
    F: FnMut(String) -> Fut,
    Fut: Future<Output = Result<(Vec<T>, String), tonic::Status>>,
{
    let mut all = Vec::new();
    let mut token = String::new();
    loop {
        let (items, next) = page(token).await?;
        all.extend(items);
        if next.is_empty() {
            return Ok(all);
        }
        if all.len() >= LIST_ITEMS_MAX {
            return Err(Failure::Failed(format!(
                "there are more than {LIST_ITEMS_MAX} entries; narrow the list with --vm or -l"
            )));
        }
        token = next;
    }
}

/// The size of the pages that lists are read in; the most that the contract allows.
pub const PAGE_SIZE: u32 = 1000;
/// The most entries a list prints.
pub const LIST_ITEMS_MAX: usize = 100_000;
/// How long an answer may take. A change waits for dataplanes to acknowledge, so it is not short.
const UNARY_PATIENCE: Duration = Duration::from_secs(30);
const UNHURRIED_PATIENCE: Duration = Duration::from_secs(600);
const PROBE_PATIENCE: Duration = Duration::from_secs(2);
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// A page of the largest messages fits (a pending request with its names is under 16 KiB).
const MESSAGE_BYTES_MAX: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_unix_sockets_with_absolute_paths() {
        let unix = |path: &str| Ok(Server::Unix(PathBuf::from(path)));

        assert_eq!("unix:///run/x.sock".parse(), unix("/run/x.sock"));
        assert_eq!("/run/x.sock".parse(), unix("/run/x.sock"));
        for (text, part) in [
            ("unix://x.sock", "no absolute path"),
            ("https://cp.example:7443", "cannot be reached yet"),
            ("tcp://127.0.0.1:1", "cannot be reached yet"),
            ("x.sock", "not a controlplane's address"),
        ] {
            let error = text.parse::<Server>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[tokio::test]
    async fn a_named_server_that_is_absent_is_an_error_that_says_how_to_start_one() {
        let connection = Connection {
            named: Some(Server::Unix(PathBuf::from("/nonexistent/vnet.sock"))),
        };

        let error = connection.open().await.unwrap_err();

        assert_eq!(error.exit_code(), 1);
        let text = error.to_string();
        assert!(
            text.contains("no controlplane answers at unix:///nonexistent/vnet.sock"),
            "{text}"
        );
        assert!(text.contains("vnet-controlplane --listen"), "{text}");
    }

    #[tokio::test]
    async fn an_endless_list_is_refused_at_the_limit() {
        let result = pages(|_| async { Ok((vec![0u8; 1000], "more".to_owned())) }).await;

        assert!(result.unwrap_err().to_string().contains("more than 100000"));
    }
}
