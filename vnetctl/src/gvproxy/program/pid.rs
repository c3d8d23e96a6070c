//! The file of `-pid-file`: this process's id in digits, without a line's end, as gvproxy writes it. Removed at the
//! end, also at one by an error, if it is still this process's.

use std::fs;
use std::io;
use std::path::PathBuf;

/// The file, for as long as this lives.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    text: String,
}

impl PidFile {
    /// Writes it. One that is there is replaced: it is of a process that ended otherwise.
    ///
    /// # Errors
    /// The system's.
    pub fn write(path: PathBuf) -> io::Result<Self> {
        let text = std::process::id().to_string();
        fs::write(&path, &text)?;
        Ok(Self { path, text })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Another that was started meanwhile keeps its own.
        if fs::read(&self.path).is_ok_and(|found| found == self.text.as_bytes()) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_the_digits_alone_and_goes_with_its_process_only() {
        let path = std::env::temp_dir().join(format!("vnetctl-pid-{}", std::process::id()));
        fs::write(&path, "1\n").unwrap();

        let file = PidFile::write(path.clone()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), std::process::id().to_string());
        drop(file);
        assert!(!path.exists());

        let file = PidFile::write(path.clone()).unwrap();
        fs::write(&path, "another").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another");
        fs::remove_file(&path).unwrap();
    }
}
