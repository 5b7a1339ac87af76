import java.io.*;
import java.net.*;
import java.nio.file.*;

class Sample {
    public static void main(String[] args) throws Exception {
        SAMPLE
    }
}
