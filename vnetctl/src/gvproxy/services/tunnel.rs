//! `/tunnel?ip=&port=`: a connection that becomes a stream into the network. And Unix sockets over
//! SSH ([`SshTunnels`]), which lead into guests too and are made elsewhere.
//!
//! A tunnel has no HTTP response: `OK`, and then the stream's bytes both ways. `OK` comes before anything is dialled,
//! and where nothing answers there the connection is closed, as in the peer; what the client sends meanwhile waits.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::address::{port_number, quoted};
use super::answer::Answer;
use crate::gvproxy::Tunnels;

/// Unix sockets of the host that lead to sockets of guests, over SSH.
#[tonic::async_trait]
pub trait SshTunnels: Send + Sync {
    /// Listens at `local`, an absolute path, and leads each client to the guest's socket that `remote` names, an
    /// `ssh-tunnel://` URL. What is in the way there is left as it is, unless it is a socket that nobody listens at.
    ///
    /// # Errors
    /// What is wrong, in gvproxy's words where it has any, on the first line; what helps, on those that follow.
    async fn expose(&self, local: &str, remote: &str) -> Result<(), String>;

    /// Ends it. One that is not there is ended already.
    fn unexpose(&self, local: &str);
}

/// What leads nowhere, where there is no network to lead into or no SSH.
#[derive(Debug, Clone, Copy)]
pub struct NoTunnels;

#[tonic::async_trait]
impl Tunnels for NoTunnels {
    async fn open(&self, _: SocketAddr) -> io::Result<UnixStream> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "no tunnels are served here",
        ))
    }
}

#[tonic::async_trait]
impl SshTunnels for NoTunnels {
    async fn expose(&self, _: &str, _: &str) -> Result<(), String> {
        Err("no forwards over SSH are served here".to_owned())
    }

    fn unexpose(&self, _: &str) {}
}

/// Where a tunnel is to lead.
///
/// # Errors
/// gvproxy's words, as an answer.
pub(super) fn target(query: &str) -> Result<SocketAddr, Answer> {
    let value = |name: &str| {
        let mut pairs = form_urlencoded::parse(query.as_bytes());
        let pair = pairs.find(|(key, _)| key == name);
        pair.map(|(_, value)| value.into_owned()).unwrap_or_default()
    };
    let ip = value("ip");
    if ip.is_empty() {
        return Err(Answer::failed("ip is mandatory"));
    }
    let port = port_number(&value("port")).map_err(Answer::failed)?;
    // The peer reads IPv4 in IPv6's spelling as IPv4, and panics at what is neither.
    let address = match ip.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => Some(address),
        Ok(IpAddr::V6(address)) => address.to_ipv4_mapped(),
        Err(_) => None,
    };
    let address: Ipv4Addr =
        address.ok_or_else(|| Answer::failed(format!("ip {} is not an IPv4 address", quoted(&ip))))?;
    if port == 0 {
        return Err(Answer::failed("port 0 leads nowhere"));
    }
    Ok(SocketAddr::from((address, port)))
}

/// Serves a connection whose request was a tunnel's. `first` is what has been read beyond that.
pub(super) async fn serve<S>(mut stream: S, first: &[u8], target: SocketAddr, tunnels: &dyn Tunnels)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if stream.write_all(b"OK").await.is_err() {
        return;
    }
    let mut inside = match tunnels.open(target).await {
        Ok(inside) => inside,
        Err(error) => {
            tracing::warn!(%target, %error, "a tunnel cannot be opened");
            return;
        }
    };
    if inside.write_all(first).await.is_err() {
        return;
    }
    // Its end, either way, is told by the streams themselves.
    let _ = tokio::io::copy_bidirectional(&mut stream, &mut inside).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_and_refused_as_gvproxy_does() {
        let right = [
            ("ip=192.168.127.2&port=22", "192.168.127.2:22"),
            ("port=22&ip=192.168.127.2&x=y", "192.168.127.2:22"),
            ("ip=%31%39%32.168.127.2&port=22", "192.168.127.2:22"),
            ("ip=::ffff:192.168.127.2&port=22", "192.168.127.2:22"),
        ];
        for (query, expected) in right {
            assert_eq!(target(query).unwrap(), expected.parse().unwrap(), "{query}");
        }
        let wrong = [
            ("", "ip is mandatory"),
            ("port=22", "ip is mandatory"),
            (
                "ip=192.168.127.2",
                r#"strconv.ParseUint: parsing "": invalid syntax"#,
            ),
            (
                "ip=192.168.127.2&port=65536",
                r#"strconv.ParseUint: parsing "65536": value out of range"#,
            ),
            ("ip=web&port=22", r#"ip "web" is not an IPv4 address"#),
            ("ip=fd00::2&port=22", r#"ip "fd00::2" is not an IPv4 address"#),
            ("ip=192.168.127.2&port=0", "port 0 leads nowhere"),
        ];
        for (query, expected) in wrong {
            assert_eq!(target(query).unwrap_err().text(), expected, "{query}");
        }
    }
}
