//! The demo's internet: a server of one page, and a server of every name.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use crate::sandbox::stage::{NetNs, in_namespace};

/// Where the page is.
pub(super) const PAGES: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// Where names are served.
pub(super) const NAMES: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The page's port.
pub(super) const PORT: u16 = 80;

/// The page: enough that it takes many packets, and different everywhere.
pub(super) fn page() -> Vec<u8> {
    (0..PAGE_LINES)
        .map(|n| format!("line {n} of the demo's page\n"))
        .collect::<String>()
        .into_bytes()
}

/// Serves both, in the stage's internet, until this process ends.
pub(super) fn serve(internet: &NetNs) -> io::Result<()> {
    let sockets = in_namespace(internet, || -> io::Result<_> {
        Ok((
            TcpListener::bind(SocketAddr::new(IpAddr::V4(PAGES), PORT))?,
            UdpSocket::bind((NAMES, DNS_PORT))?,
        ))
    });
    let lost = |_| io::Error::other("the thread that opens the internet's sockets was lost");
    let (pages, names) = sockets.join().map_err(lost)???;
    std::thread::spawn(move || {
        for stream in pages.incoming().flatten() {
            std::thread::spawn(move || answer_page(stream));
        }
    });
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((length, from)) = names.recv_from(&mut question) {
            if let Some(answer) = answer_name(&question[..length]) {
                let _ = names.send_to(&answer, from);
            }
        }
    });
    Ok(())
}

fn answer_page(mut stream: TcpStream) {
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let mut request = Vec::new();
    let mut chunk = [0; 256];
    // All of it: closing with something unread would reset the connection.
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut chunk) {
            Ok(length @ 1..) if request.len() < REQUEST_BYTES_MAX => {
                request.extend_from_slice(&chunk[..length])
            }
            _ => return,
        }
    }
    let page = page();
    let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", page.len());
    let _ = stream
        .write_all(head.as_bytes())
        .and_then(|()| stream.write_all(&page));
}

/// Every name has the page's address, and no other record (RFC 1035 §4.1).
fn answer_name(question: &[u8]) -> Option<Vec<u8>> {
    let name_length = question.get(HEADER_BYTES..)?.iter().position(|byte| *byte == 0)? + 1;
    let end = HEADER_BYTES + name_length + 4;
    let query_type = u16::from_be_bytes(question.get(end - 4..end - 2)?.try_into().ok()?);
    let is_address = query_type == TYPE_A;
    let mut answer = question.get(..2)?.to_vec();
    // A response, recursion desired and available; one question, one answer or none.
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
    answer.extend(question.get(HEADER_BYTES..end)?);
    if is_address {
        // The name is the question's, by reference; class IN, 60 seconds, four bytes.
        answer.extend([0xc0, HEADER_BYTES as u8, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(PAGES.octets());
    }
    Some(answer)
}

const PAGE_LINES: usize = 10_000;
const REQUEST_BYTES_MAX: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(10);
const DNS_PORT: u16 = 53;
const HEADER_BYTES: usize = 12;
const TYPE_A: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_pages_address_and_no_other_record() {
        let question = |kind: u8| {
            let mut bytes = vec![
                0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 0, 0, kind, 0, 1,
            ];
            bytes[14] = 0;
            bytes
        };

        let answer = answer_name(&question(1)).unwrap();
        assert_eq!(&answer[..2], [0xab, 0xcd]);
        assert_eq!(answer[7], 1);
        assert_eq!(&answer[answer.len() - 4..], PAGES.octets());

        assert_eq!(answer_name(&question(28)).unwrap()[7], 0);
        for length in 0..question(1).len() {
            assert_eq!(answer_name(&question(1)[..length]), None, "cut at {length}");
        }
    }
}
