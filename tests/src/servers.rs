//! Servers in a namespace: HTTP, echo over TCP and UDP, and anything that speaks on a TCP connection.
//! Each counts what reached it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use vnetctl::sandbox::stage::{NetNs, in_namespace};

/// A server; it serves until the test ends.
#[derive(Debug, Clone)]
pub struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
}

impl Server {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections accepted so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Requests or datagrams received so far.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// Makes something in a namespace.
///
/// # Panics
/// When the namespace cannot be entered.
pub fn inside<T: Send + 'static>(namespace: &NetNs, make: impl FnOnce() -> T + Send + 'static) -> T {
    in_namespace(namespace, make)
        .join()
        .expect("making a socket does not panic")
        .expect("a stage's namespace can be entered")
}

/// Serves TCP: `serve` has a thread for each connection, and the server to count requests on.
///
/// # Panics
/// When the address cannot be listened on.
pub fn tcp(
    namespace: &NetNs,
    address: &str,
    serve: impl Fn(TcpStream, &Server) + Send + Sync + 'static,
) -> Server {
    let wanted = address.to_owned();
    let listener = inside(namespace, move || {
        TcpListener::bind(&wanted).unwrap_or_else(|error| panic!("{wanted}: {error}"))
    });
    serve_on(listener, serve)
}

fn serve_on(listener: TcpListener, serve: impl Fn(TcpStream, &Server) + Send + Sync + 'static) -> Server {
    let server = Server {
        address: listener.local_addr().expect("it is bound"),
        connections: Arc::default(),
        requests: Arc::default(),
    };
    let own = server.clone();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            own.connections.fetch_add(1, Ordering::SeqCst);
            let (serve, own) = (Arc::clone(&serve), own.clone());
            thread::spawn(move || serve(stream, &own));
        }
    });
    server
}

/// Serves HTTP/1.1. `GET /bytes/N` is answered with N bytes, `GET /drip` with a byte every 20 ms without
/// end, anything else with a line that names the server and the path. Connections are kept alive.
pub fn http(namespace: &NetNs, address: &str) -> Server {
    tcp(namespace, address, |stream, server| {
        let _ = serve_http(stream, server);
    })
}

/// The same where the caller is.
///
/// # Panics
/// When the address cannot be listened on.
pub fn http_here(address: &str) -> Server {
    let listener = TcpListener::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    serve_on(listener, |stream, server| {
        let _ = serve_http(stream, server);
    })
}

fn serve_http(mut stream: TcpStream, server: &Server) -> std::io::Result<()> {
    let mut input = BufReader::new(stream.try_clone()?);
    loop {
        let mut request = String::new();
        if input.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut header = String::new();
        while input.read_line(&mut header)? > 2 {
            header.clear();
        }
        server.requests.fetch_add(1, Ordering::SeqCst);
        let path = request.split_whitespace().nth(1).unwrap_or("/").to_owned();
        if path == "/drip" {
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
            loop {
                stream.write_all(b".")?;
                thread::sleep(Duration::from_millis(20));
            }
        }
        let body = match path.strip_prefix("/bytes/").and_then(|n| n.parse().ok()) {
            Some(length) => vec![b'x'; length],
            None => format!("this is {} at {path}\n", server.address).into_bytes(),
        };
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )?;
        stream.write_all(&body)?;
    }
}

/// Returns every byte of a TCP connection, and its end.
pub fn echo(namespace: &NetNs, address: &str) -> Server {
    tcp(namespace, address, |mut stream, server| {
        let mut chunk = [0; 65536];
        while let Ok(length @ 1..) = stream.read(&mut chunk) {
            server.requests.fetch_add(1, Ordering::SeqCst);
            if stream.write_all(&chunk[..length]).is_err() {
                return;
            }
        }
    })
}

/// Returns every datagram.
///
/// # Panics
/// When the address cannot be bound.
pub fn udp_echo(namespace: &NetNs, address: &str) -> Server {
    let wanted = address.to_owned();
    let socket = inside(namespace, move || {
        UdpSocket::bind(&wanted).unwrap_or_else(|error| panic!("{wanted}: {error}"))
    });
    let server = Server {
        address: socket.local_addr().expect("it is bound"),
        connections: Arc::default(),
        requests: Arc::default(),
    };
    let own = server.clone();
    thread::spawn(move || {
        let mut datagram = [0; 65536];
        loop {
            // An ICMP error of an earlier answer is no reason to stop.
            if let Ok((length, from)) = socket.recv_from(&mut datagram) {
                own.requests.fetch_add(1, Ordering::SeqCst);
                let _ = socket.send_to(&datagram[..length], from);
            }
        }
    });
    server
}
