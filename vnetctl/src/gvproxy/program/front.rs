//! The front's part of a network: streams into it by the channel to its dataplane, and who serves the requests that
//! come by that channel and at the socket of `-services`.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::mpsc;
use vnet_proto::model::{ForwardListen, Protocol, VmId};

use crate::failure::with_causes;
use crate::gvproxy;
use crate::gvproxy::services::{self, Guest, Origin, Services};
use crate::gvproxy::ssh;
use crate::launch::{
    AsyncStream, FrontMessage, FrontReceiver, FrontSender, Holder, HostStream, ListenAt, SocketFile,
    StreamListener, holder_of_port,
};

/// Connections of the services' socket that were accepted and wait to be served.
const ACCEPTED_MAX: usize = 16;
/// How long accepting rests when the host has no descriptor left.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Opens streams into the network: each is one end of a pair, of which the dataplane gets the other.
#[derive(Debug, Clone)]
pub(super) struct Tunnels(pub(super) FrontSender);

#[tonic::async_trait]
impl gvproxy::Tunnels for Tunnels {
    async fn open(&self, target: SocketAddr) -> io::Result<UnixStream> {
        let (here, there) = std::os::unix::net::UnixStream::pair()?;
        here.set_nonblocking(true)?;
        let message = FrontMessage::Tunnel { target };
        self.0.send(&message, there).map_err(io::Error::other)?;
        UnixStream::from_std(here)
    }
}

/// Sockets that are exposed over SSH, as the services API calls them.
pub(super) struct SshTunnels(pub(super) ssh::SshTunnels);

#[tonic::async_trait]
impl services::SshTunnels for SshTunnels {
    async fn expose(&self, local: &str, remote: &str) -> Result<(), String> {
        let exposed = self.0.expose(local, remote).await;
        exposed.map_err(|error| with_causes(&error))
    }

    fn unexpose(&self, local: &str) {
        // One that is not there is ended already.
        let _ = self.0.unexpose(local);
    }
}

/// The socket of `-services`, bound.
pub(super) struct ServicesSocket {
    /// Where it listens, if over TCP: closed to guests.
    pub(super) tcp_address: Option<SocketAddr>,
    accepted: mpsc::Receiver<OwnedFd>,
    origin: Origin,
    /// Removed at the end.
    _file: Option<SocketFile>,
}

impl ServicesSocket {
    /// Binds it.
    ///
    /// # Errors
    /// The system's; where something has the place, with what that is, if the system tells.
    pub(super) fn open(at: &ListenAt) -> io::Result<Self> {
        let opened = StreamListener::open(at).map_err(|error| match error.kind() {
            // Nothing else is worth the search, which takes its time.
            io::ErrorKind::AddrInUse => match held(at) {
                Some(holder) => io::Error::new(error.kind(), format!("it is {holder}")),
                None => error,
            },
            _ => error,
        });
        let (listener, file) = opened?;
        let listener = listener.of_clients()?;
        let origin = origin(at);
        let tcp_address = listener.tcp_address();
        let (sender, accepted) = mpsc::channel(ACCEPTED_MAX);
        std::thread::Builder::new()
            .name("services".to_owned())
            .spawn(move || accept(&listener, &sender))?;
        Ok(Self {
            tcp_address,
            accepted,
            origin,
            _file: file,
        })
    }
}

/// What has a place.
fn held(at: &ListenAt) -> Option<Holder> {
    let listen = match at {
        ListenAt::Unix(path) => ForwardListen::Unix(path.clone()),
        ListenAt::Tcp(address) => ForwardListen::Address(*address),
        ListenAt::Vsock { .. } | ListenAt::Fd(_) => return None,
    };
    holder_of_port(Protocol::Tcp, &listen)
}

/// Who can be at the other end.
fn origin(at: &ListenAt) -> Origin {
    match at {
        // Every VM of this host.
        ListenAt::Vsock { .. } => Origin::Listen,
        ListenAt::Unix(_) | ListenAt::Tcp(_) | ListenAt::Fd(_) => Origin::Services,
    }
}

fn accept(listener: &StreamListener, sender: &mpsc::Sender<OwnedFd>) {
    loop {
        match listener.accept() {
            Ok(stream) => {
                if sender.blocking_send(stream.into()).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the services' socket cannot accept");
                std::thread::sleep(ACCEPT_AGAIN);
            }
        }
    }
}

/// Serves whatever comes, until the channel to the dataplane can be read no more.
///
/// # Errors
/// Why not.
pub(super) async fn serve(
    services: Arc<Services>,
    mut requests: FrontReceiver,
    mut socket: Option<ServicesSocket>,
) -> io::Result<std::convert::Infallible> {
    loop {
        let (stream, read, origin) = tokio::select! {
            received = requests.receive() => match received? {
                (FrontMessage::Services { read, .. }, stream) => (stream, read, Origin::Listen),
                (FrontMessage::Guest { vm, address }, stream) => {
                    (stream, Vec::new(), Origin::Guest(Guest { vm: VmId(vm), address }))
                }
                // A dataplane asks for none.
                (FrontMessage::Tunnel { .. }, _) => continue,
            },
            (stream, origin) = next(&mut socket) => (stream, Vec::new(), origin),
        };
        match AsyncStream::new(stream) {
            Ok(stream) => {
                let services = Arc::clone(&services);
                tokio::spawn(async move { services.serve_stream(stream, read, origin).await });
            }
            Err(error) => tracing::warn!(%error, "a connection to the services cannot be followed"),
        }
    }
}

async fn next(socket: &mut Option<ServicesSocket>) -> (HostStream, Origin) {
    if let Some(ServicesSocket { accepted, origin, .. }) = socket
        && let Some(stream) = accepted.recv().await
    {
        return (HostStream::accepted(stream), *origin);
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn who_has_the_place_is_told() {
        let path = std::env::temp_dir().join(format!("vnetctl-services-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let _unix = std::os::unix::net::UnixListener::bind(&path).unwrap();
        for at in [
            ListenAt::Tcp(tcp.local_addr().unwrap()),
            ListenAt::Unix(path.clone()),
        ] {
            let refused = ServicesSocket::open(&at).err().unwrap().to_string();
            let own = format!("(pid {})", std::process::id());
            assert!(
                refused.starts_with("it is ") && refused.ends_with(&own),
                "{refused}"
            );
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn who_comes_over_vsock_may_be_a_vm() {
        for cid in [None, Some(2)] {
            assert_eq!(origin(&ListenAt::Vsock { cid, port: 1024 }), Origin::Listen);
        }
        assert_eq!(origin(&ListenAt::Unix("/run/a.sock".into())), Origin::Services);
        let loopback = "127.0.0.1:7777".parse().unwrap();
        assert_eq!(origin(&ListenAt::Tcp(loopback)), Origin::Services);
    }
}
