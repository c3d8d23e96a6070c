//! The sockets that forwards listen on.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::net::UnixListener;
use std::path::Path;

use socket2::{Domain, Socket, Type};
use vnet_proto::model::{ForwardListen, Protocol};

use crate::forward::error::ForwardError;
use crate::link::listen::{CLIENTS_BACKLOG, SocketFile, bind_private, found_at};

/// A socket that listens, non-blocking.
#[derive(Debug)]
pub(super) enum Bound {
    /// TCP.
    Tcp(TcpListener),
    /// UDP.
    Udp(UdpSocket),
    /// A Unix stream socket, and its name in the file system.
    Unix(UnixListener, SocketFile),
}

impl Bound {
    /// Listens. Who has the place, where something has, is not looked for here.
    pub(super) fn new(protocol: Protocol, listen: &ForwardListen) -> Result<Self, ForwardError> {
        let refused = |error| ForwardError::of(protocol, listen, error);
        match listen {
            ForwardListen::Unix(path) => unix(path).map_err(|error| match found_at(path) {
                Some(found) if error.kind() == io::ErrorKind::AlreadyExists => ForwardError::PathTaken {
                    listen: listen.clone(),
                    found,
                },
                _ => refused(error),
            }),
            ForwardListen::Address(address) if protocol == Protocol::Udp => {
                let socket = open(*address, Type::DGRAM).map_err(refused)?;
                Ok(Self::Udp(socket.into()))
            }
            ForwardListen::Address(address) => {
                let socket = open(*address, Type::STREAM).map_err(refused)?;
                socket.listen(CLIENTS_BACKLOG).map_err(refused)?;
                Ok(Self::Tcp(socket.into()))
            }
        }
    }

    /// Where it really listens: port 0 replaced.
    pub(super) fn listens(&self) -> io::Result<ForwardListen> {
        Ok(match self {
            Self::Tcp(socket) => socket.local_addr()?.into(),
            Self::Udp(socket) => socket.local_addr()?.into(),
            Self::Unix(_, file) => ForwardListen::Unix(file.path().to_owned()),
        })
    }
}

/// Whether a place can be bound now, without listening there. A Unix socket's is looked at when it is made.
pub(super) fn look(protocol: Protocol, listen: &ForwardListen) -> Result<(), ForwardError> {
    let ForwardListen::Address(address) = listen else {
        return Ok(());
    };
    let kind = match protocol {
        Protocol::Udp => Type::DGRAM,
        _ => Type::STREAM,
    };
    open(*address, kind)
        .map(drop)
        .map_err(|error| ForwardError::of(protocol, listen, error))
}

/// A socket that is bound. One of IPv6 has IPv6 alone, so that `[::]` and `0.0.0.0` are two places.
fn open(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        // Connections of an earlier listener that are not quite over are not in the way (socket(7)).
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn unix(path: &Path) -> io::Result<Bound> {
    let (socket, file) = bind_private(path, Type::STREAM)?;
    socket.listen(CLIENTS_BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(Bound::Unix(socket.into(), file))
}
