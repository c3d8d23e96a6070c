//! The demo's guest: fetches one page, as `curl` would, where there may be no `curl`.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::Duration;

/// The hidden first argument with which this program is the demo's guest.
pub const FETCH_ROLE: &str = "__fetch";

/// Fetches `HOST:PORT`, prints the page, and fails as the network does.
pub fn main(arguments: &[OsString]) -> ExitCode {
    let target = arguments
        .get(2)
        .map(|a| a.to_string_lossy().into_owned())
        .unwrap_or_default();
    match fetch(&target) {
        Ok(page) if io::stdout().write_all(&page).is_ok() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            crate::output::say(format_args!("fetch: {target}: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn fetch(target: &str) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET / HTTP/1.0\r\nHost: {target}\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.take(PAGE_BYTES_MAX).read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n");
    let end =
        end.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the answer has no end of its head"))?;
    Ok(answer.split_off(end + 4))
}

const PATIENCE: Duration = Duration::from_secs(30);
const PAGE_BYTES_MAX: u64 = 8 << 20;
